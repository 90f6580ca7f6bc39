"""Stage 3: policy optimisation by A-GRPO, with rule-based and learned rewards."""

import sys
from time import perf_counter

from agrpo.algorithms.divergences import describe
from agrpo.config import PolicyConfig, parse_command_line
from agrpo.data.load import encode_prompts, read_prompts, require_batch
from agrpo.data.streams import Stream
from agrpo.engine import distributed
from agrpo.engine.backends.native import Sampling
from agrpo.engine.hybrid import HybridEngine
from agrpo.engine.modules import Policy
from agrpo.evaluation.policy import evaluate_policy
from agrpo.models import load_language_model, load_tokenizer, make_trainable, save_language_model, stop_ids
from agrpo.training.controllers import Controllers
from agrpo.training.experience import estimate_advantages, prune, score
from agrpo.training.samples import rollout_metrics, sample_rows, write_evaluation
from agrpo.training.schedule import learning_rate
from agrpo.training.session import Session, readable_errors
from agrpo.training.update import update_policy
from agrpo.types import Experience, Prompt
from reward_models.configured import require_scores, reward_set


def main(config: PolicyConfig) -> None:
    session = Session(config, "agrpo")
    log, sampling, evaluation = session.log, config.sampling, config.evaluation
    rewards, verifier = reward_set(config.rewards), reward_set(evaluation.rewards) if evaluation.rewards else None
    data = read_prompts(config.data, log.note)

    tokenizer, notes = load_tokenizer(config.model)
    session.notes(notes)
    prompts = encode_prompts(data, tokenizer, sampling.max_prompt_length, log.note)
    require_batch(len(prompts), sampling.prompts_per_step, "prompts", "sampling.prompts_per_step")
    held_out = {
        name: encode_prompts(read_prompts(source, log.note), tokenizer, sampling.max_prompt_length, log.note)
        for name, source in (("validation", evaluation.data), ("test", evaluation.test))
        if source is not None
    }
    lm = load_language_model(config.model, tokenizer, config.seed)
    stop = stop_ids(tokenizer, lm)
    policy = Policy(make_trainable(lm, config.model))
    engine = HybridEngine(
        policy,
        engine=config.engine,
        training=config.training,
        tokenizer=tokenizer,
        stop=stop,
        rollout=config.rollout,
        dtype=config.model.dtype,
        with_reference=config.needs_reference,
    )
    controllers = Controllers(config)
    session.describe(policy)
    session.notes([describe(config.objective.kl), *controllers.notes])
    results = {}
    if evaluation.test_before and session.first_step == 0:
        before = evaluate_policy(engine, held_out["test"], verifier, evaluation, config.seed)
        results |= write_evaluation(session, "before", before)

    stream = Stream(len(prompts), sampling.prompts_per_step, config.seed, distributed.rank(), distributed.world())
    session.restore(engine, stream=stream, controllers=controllers)
    how = Sampling(sampling.max_completion_length, sampling.temperature, sampling.top_p)
    for step in session.steps():
        clock = [perf_counter()]
        asked = [Prompt(prompts[i].text, prompts[i].ids, slot, prompts[i].columns) for slot, i in next(stream)]
        rollout = engine.generate(asked, [sampling.num_generations] * len(asked), how, (config.seed, step))
        clock.append(perf_counter())
        scores = score(rewards, rollout)  # (N, K)
        require_scores(rewards, scores)
        clock.append(perf_counter())
        total = rewards.total(scores)  # (N,)
        experience = Experience(rollout, total, estimate_advantages(total, rollout, config.advantage))
        rate = learning_rate(step, config.training)
        metrics = update_policy(
            engine,
            prune(experience, config.pruning.rate),
            controllers.coefficients(),
            config.objective,
            config.training,
            sampling,
            rate,
        )
        clock.append(perf_counter())
        metrics |= rollout_metrics(experience, scores, rewards, clock)
        metrics |= {"learning_rate": rate, **controllers.metrics()}
        controllers.observe(metrics)
        if session.evaluation_due(step):
            metrics |= evaluate_policy(engine, held_out["validation"], verifier, evaluation, config.seed).metrics()
        log.step(step, metrics)
        log.samples(step, sample_rows(experience, scores, rewards, config.logging.samples_per_step))

    if "test" in held_out:
        after = evaluate_policy(engine, held_out["test"], verifier, evaluation, config.seed)
        results |= write_evaluation(session, "test", after)
    engine.generation_mode()
    session.finish(results, lambda folder: save_language_model(engine.whole_policy.lm, tokenizer, folder))


if __name__ == "__main__":
    with readable_errors():
        main(parse_command_line("agrpo", sys.argv[1:]))
