"""Before stage 2, where there are no preference data: sample groups from a policy and rank them by any reward."""

import sys

import torch

from agrpo.config import PreferencesConfig, parse_command_line
from agrpo.data.load import encode_prompts, read_prompts
from agrpo.data.records import DataError
from agrpo.doctor.estimate import before_loading
from agrpo.engine import distributed
from agrpo.engine.backends.build import build_backend
from agrpo.engine.backends.native import Sampling
from agrpo.engine.modules import Policy, cast_weights
from agrpo.models import load_language_model, load_tokenizer, stop_ids
from agrpo.reporting.files import replace, to_json
from agrpo.training.scoring import ranked_groups, score
from agrpo.training.session import readable_errors
from reward_models.configured import require_scores, reward_set


def main(config: PreferencesConfig) -> None:
    distributed.start()
    say = print if distributed.rank() == 0 else lambda text: None
    for note in before_loading(config):
        say(note)
    rewards = reward_set(config.rewards)
    tokenizer, _ = load_tokenizer(config.model)
    data = read_prompts(config.data, say)
    prompts = encode_prompts(data, tokenizer, config.sampling.max_prompt_length, say)
    lm = load_language_model(config.model, tokenizer, config.seed)
    policy = cast_weights(Policy(lm), getattr(torch, config.model.dtype)).to(distributed.device()).eval()
    sampling = config.sampling
    longest = sampling.max_prompt_length + sampling.max_completion_length
    stop = stop_ids(tokenizer, lm)
    backend = build_backend(config.rollout, policy, tokenizer=tokenizer, stop=stop, longest=longest)
    backend.follow(0)
    how = Sampling.of(sampling)
    own = prompts[distributed.rank() :: distributed.world()]
    rollout = backend.generate(own, [sampling.num_generations] * len(own), how, (config.seed, 0))
    scores = score(rewards, rollout)
    require_scores(rewards, scores)
    votes = scores if config.confidence == "ensemble" else None
    groups = sorted(
        (g for part in distributed.gather_objects(ranked_groups(rollout, rewards.total(scores), votes)) for g in part),
        key=lambda g: g["slot"],
    )
    if len(groups) < 2:
        raise DataError(
            f"data: {len(groups)} of {len(prompts)} prompts gave completions of different reward; bring other prompts,"
            " more sampling.num_generations, or another reward"
        )
    if distributed.rank() == 0:
        config.out.mkdir(parents=True, exist_ok=True)
        cut = round(len(groups) * (1 - config.held_out))
        for name, part in (("train", groups[:cut]), ("test", groups[cut:])):
            replace(config.out / f"{name}.jsonl", (to_json(g) + "\n" for g in part))
    say(
        f"preferences: {len(groups)} of {len(prompts)} prompts gave completions of different reward;"
        f" {config.out}/train.jsonl and test.jsonl"
    )
    distributed.stop()


if __name__ == "__main__":
    with readable_errors():
        main(parse_command_line("preferences", sys.argv[1:]))
