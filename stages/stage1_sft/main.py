"""Stage 1: supervised fine-tuning on demonstrations."""

import sys
import time
from functools import partial

from agrpo.config import SFTConfig, parse_command_line
from agrpo.data.load import (
    encode_demonstrations,
    encode_prompts,
    read_demonstrations,
    read_prompts,
    require_batch,
    texts_of,
)
from agrpo.data.streams import Stream
from agrpo.doctor.estimate import before_loading
from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.engine.modules import Policy
from agrpo.engine.turns import with_environment
from agrpo.environments.loading import load_environment
from agrpo.evaluation.policy import evaluate_policy
from agrpo.models import load_language_model, load_tokenizer, make_trainable, save_language_model, stop_ids
from agrpo.training.batches import Sequences
from agrpo.training.imitation import evaluation_loss, imitate
from agrpo.training.samples import write_evaluation
from agrpo.training.schedule import learning_rate
from agrpo.training.session import Session, readable_errors
from reward_models.configured import reward_set


def main(config: SFTConfig) -> None:
    session = Session(config, "sft")
    session.notes(before_loading(config))
    log, training, evaluation = session.log, config.training, config.evaluation
    environment = load_environment(config.environment)
    data = read_demonstrations(config.data, log.note)
    tokenizer, notes = load_tokenizer(config.model, texts_of(data))
    session.notes(notes)
    data, prompts, completions = encode_demonstrations(data, tokenizer, config.max_length, log.note)
    require_batch(len(prompts), training.batch_size, "demonstrations", "training.batch_size")
    lm = load_language_model(config.model, tokenizer, config.seed)
    stop = stop_ids(tokenizer, lm)
    policy = Policy(make_trainable(lm, config.model, config.seed))
    engine = HybridEngine(
        policy, engine=config.engine, training=training, tokenizer=tokenizer, stop=stop, dtype=config.model.dtype
    )
    speaker = with_environment(engine, config.environment, environment, tokenizer, in_step=True, note=log.note)
    save_model = partial(save_language_model, engine.whole_policy.lm, tokenizer)
    session.describe(policy)

    held_out = test = None
    rewards = reward_set(evaluation.rewards) if evaluation.rewards else None
    if evaluation.data is not None:
        rows, *tokens = encode_demonstrations(
            read_demonstrations(evaluation.data, log.note), tokenizer, config.max_length, log.note
        )
        held_out = encode_prompts(rows, tokenizer, config.max_length, log.note)
    if evaluation.test is not None:
        test = encode_prompts(read_prompts(evaluation.test, log.note), tokenizer, config.max_length, log.note)
    stream = Stream(len(prompts), training.batch_size, config.seed, distributed.rank(), distributed.world())
    session.restore(engine, stream=stream)
    session.push_saves(save_model)
    if session.measures_before():
        before = evaluate_policy(speaker, test, rewards, evaluation, config.seed)
        session.results |= write_evaluation(session, "before", before)
    for step in session.steps():
        began = time.perf_counter()
        rows = [index for _, index in next(stream)]
        batch = Sequences.of([prompts[i] for i in rows], [completions[i] for i in rows])
        rate = learning_rate(step, training)
        with session.guard(step, [data[i] for i in rows]):
            update = partial(imitate, engine, batch, learning_rate=rate)
            metrics = session.in_micro_batches(lambda own, update=update: update(own.training.micro_batch_tokens))
        seconds = time.perf_counter() - began
        metrics |= {"learning_rate": rate, "time/step_s": seconds}
        metrics["throughput/completion_tokens_per_s"] = metrics["num_tokens"] / seconds
        if session.evaluation_due(step):
            metrics["evaluation/loss"] = evaluation_loss(engine, *tokens, training.micro_batch_tokens)
            if rewards is not None:
                metrics |= evaluate_policy(speaker, held_out, rewards, evaluation, config.seed).metrics()
        log.step(step, metrics)

    results = dict(session.results)
    if held_out is not None:
        results["validation_loss"] = evaluation_loss(engine, *tokens, training.micro_batch_tokens)
    if test is not None:
        results |= write_evaluation(session, "test", evaluate_policy(speaker, test, rewards, evaluation, config.seed))
    engine.gather()
    session.finish(results, save_model)


if __name__ == "__main__":
    with readable_errors():
        main(parse_command_line("sft", sys.argv[1:]))
