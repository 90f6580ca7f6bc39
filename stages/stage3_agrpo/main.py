"""Stage 3: policy optimisation by A-GRPO, with rule-based and learned rewards."""

import sys
from functools import partial
from time import perf_counter

from agrpo.algorithms.divergences import describe
from agrpo.config import PolicyConfig, parse_command_line
from agrpo.data.load import encode_prompts, read_prompts, require_batch
from agrpo.data.streams import Stream
from agrpo.doctor.estimate import before_loading
from agrpo.engine import distributed
from agrpo.engine.hybrid import HybridEngine
from agrpo.engine.modules import ActorCritic, Policy
from agrpo.engine.turns import with_environment
from agrpo.environments.loading import load_environment
from agrpo.evaluation.policy import evaluate_policy
from agrpo.models import load_language_model, load_tokenizer, make_trainable, save_language_model, stop_ids
from agrpo.training.buffer import Buffer
from agrpo.training.controllers import Controllers
from agrpo.training.experience import make_experience, prune
from agrpo.training.grouping import Sampler
from agrpo.training.ranked import RankedData
from agrpo.training.samples import rollout_metrics, sample_rows, write_evaluation
from agrpo.training.schedule import learning_rate
from agrpo.training.scoring import observe_scores
from agrpo.training.session import Session, readable_errors
from agrpo.training.update import update_policy
from reward_models.configured import require_scores, reward_set


def main(config: PolicyConfig) -> None:
    session = Session(config, "agrpo")
    session.notes(before_loading(config))
    log, sampling, evaluation = session.log, config.sampling, config.evaluation
    rewards, verifier = reward_set(config.rewards), reward_set(evaluation.rewards) if evaluation.rewards else None
    environment = load_environment(config.environment)
    data = read_prompts(config.data, log.note)

    tokenizer, notes = load_tokenizer(config.model)
    session.notes(notes)
    prompts = encode_prompts(data, tokenizer, sampling.max_prompt_length, log.note)
    require_batch(len(prompts), config.prompts_per_rollout, "prompts", "sampling.prompts_per_step")
    held_out = {
        name: encode_prompts(read_prompts(source, log.note), tokenizer, sampling.max_prompt_length, log.note)
        for name, source in (("validation", evaluation.data), ("test", evaluation.test))
        if source is not None
    }
    lm = load_language_model(config.model, tokenizer, config.seed)
    stop = stop_ids(tokenizer, lm)
    policy = (ActorCritic if config.needs_critic else Policy)(make_trainable(lm, config.model, config.seed))
    engine = HybridEngine(
        policy,
        engine=config.engine,
        training=config.training,
        tokenizer=tokenizer,
        stop=stop,
        rollout=config.rollout,
        longest=config.longest_sequence,
        dtype=config.model.dtype,
        with_reference=config.needs_reference,
        note=log.note,
    )
    speaker = with_environment(engine, config.environment, environment, tokenizer, in_step=True, note=log.note)
    controllers = Controllers(config)
    save_model = partial(save_language_model, engine.whole_policy.lm, tokenizer)
    session.describe(policy)
    session.notes([describe(config.objective.kl), *controllers.notes])
    stream = Stream(len(prompts), config.prompts_per_rollout, config.seed, distributed.rank(), distributed.world())
    ranked = RankedData(config, tokenizer, log.note)
    buffer = Buffer(session.pause)
    sample = Sampler(config, prompts, stream, rewards)
    tracked = {"stream": stream, "ranked": ranked, "controllers": controllers, "rewards": rewards}
    session.restore(engine, **tracked, sampler=sample, buffer=buffer)
    session.push_saves(save_model)
    if session.measures_before():
        before = evaluate_policy(speaker, held_out["test"], verifier, evaluation, config.seed)
        session.results |= write_evaluation(session, "before", before)
    for step in session.steps():
        began = perf_counter()
        resumed = buffer.in_use
        if not resumed:
            rollout, scores, metrics = sample(speaker, step)
            require_scores(rewards, scores)
            experience = make_experience(engine, rollout, scores, rewards, config, controllers.beta.value)
            buffer.fill(experience, metrics | rollout_metrics(experience, rewards))
        sampled = perf_counter()
        experience, metrics = buffer.experience, buffer.metrics
        rate = learning_rate(step, config.training)
        kept, of_step = prune(experience, config.pruning), ranked.again() if resumed else next(ranked)
        coefficients = controllers.coefficients()
        with session.guard(step, experience):
            update = partial(
                update_policy, engine, kept, coefficients, learning_rate=rate, ranked=of_step, buffer=buffer
            )
            metrics |= session.in_micro_batches(lambda own, update=update: update(own))
        buffer.clear()
        done = perf_counter()
        metrics |= {"time/update_s": done - sampled, "time/step_s": done - began}
        metrics |= {"throughput/completion_tokens_per_s": metrics["num_tokens"] / (done - began)}
        metrics |= {"learning_rate": rate, **controllers.metrics()}
        session.notes(controllers.observe(metrics))
        observe_scores(rewards, experience.scores)
        if session.evaluation_due(step):
            metrics |= evaluate_policy(speaker, held_out["validation"], verifier, evaluation, config.seed).metrics()
        log.step(step, metrics)
        few = config.logging.samples_per_step
        log.samples(step, sample_rows(engine, experience, rewards, few, sampling.temperature))

    results = dict(session.results)
    if "test" in held_out:
        after = evaluate_policy(speaker, held_out["test"], verifier, evaluation, config.seed)
        results |= write_evaluation(session, "test", after)
    engine.gather()
    session.finish(results, save_model)


if __name__ == "__main__":
    with readable_errors():
        main(parse_command_line("agrpo", sys.argv[1:]))
