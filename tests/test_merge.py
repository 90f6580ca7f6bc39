"""A merged model speaks as its parts did: greedy tokens before and after, in transformers and, where it is, in vLLM."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from stage_runs import environment, run_tiny, tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

from agrpo.merge import main, merge
from agrpo.types import InputError

PROMPTS = ("1+2=", "7-3+4=", "9")


def greedy(lm, folder, count=16):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        out = lm.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
        made.append(out[0, ids.shape[1] :].tolist())
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    # heads of 32: vLLM's CPU build has none of 8; untied, since its copy of a tied head is another matter
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return tiny_policy(tmp_path_factory.mktemp("base") / "model", **sizes)


@pytest.fixture(scope="module", params=["lora", "dora"])
def adapter(request, base, tmp_path_factory):
    """A PEFT adapter that changes what the model says."""
    torch.manual_seed(0)
    options = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=request.param == "dora")
    lm = get_peft_model(AutoModelForCausalLM.from_pretrained(base), options)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("adapter")
    lm.save_pretrained(folder)
    told = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**told, "base_model_name_or_path": str(base)}))
    return folder


def test_an_adapter_merged_says_what_base_and_adapter_say(base, adapter, tmp_path):
    out = tmp_path / "merged"
    assert main([str(adapter), str(out)]) == 0
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = greedy(plain, base)
    adapted = greedy(PeftModel.from_pretrained(plain, adapter).eval(), base)
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert greedy(merged, out) == adapted != before
    assert not any("lora" in name for name in merged.state_dict())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
def test_a_merged_model_says_the_same_in_vllm(base, adapter, tmp_path):
    merge(adapter, tmp_path / "merged")
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]
    program = (
        "import json, sys\n"
        "from vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], dtype='float32', max_model_len=64, enforce_eager=True, block_size=32)\n"
        "how = SamplingParams(temperature=0.0, max_tokens=16)\n"
        "answers = llm.generate([{'prompt_token_ids': p} for p in json.loads(sys.argv[2])], how, use_tqdm=False)\n"
        "print('said', json.dumps([list(a.outputs[0].token_ids) for a in answers]))\n"
    )
    quiet = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "merged"), json.dumps(asked)],
        env=environment() | quiet, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.rpartition("said ")[2])
    assert said == greedy(lm, tmp_path / "merged")


def test_a_runs_model_is_its_own_and_an_unfinished_runs_is_its_newest_checkpoints(tmp_path):
    run = tmp_path / "run"
    run_tiny("sft", run, "model.lora={rank: 4}", "checkpoint.every=5", "training.learning_rate=0.05")
    merge(run, tmp_path / "finished")
    own = AutoModelForCausalLM.from_pretrained(run / "sft" / "model").state_dict()
    shutil.rmtree(run / "sft" / "model")
    (run / "sft" / "result.json").unlink()
    told = merge(run, tmp_path / "unfinished")
    assert "step-000005" in told
    for name in ("finished", "unfinished"):
        weights = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        assert weights.keys() == own.keys() and all(torch.equal(weights[key], own[key]) for key in own)
        card = (tmp_path / name / "README.md").read_text()
        assert "LoRA of rank 4" in card
    assert len(AutoTokenizer.from_pretrained(tmp_path / "unfinished")) == len(
        AutoTokenizer.from_pretrained(tmp_path / "finished")
    )


def test_what_cannot_be_merged_is_said(base, adapter, tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(InputError, match="taken: exists"):
        merge(base, tmp_path / "taken")
    with pytest.raises(InputError, match="no such folder"):
        merge(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(InputError, match="is no adapter"):
        merge(base, tmp_path / "out", base=str(base))
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        merge(pickled, tmp_path / "out")
    other = tiny_policy(tmp_path / "other" / "model", hidden_size=32)
    assert main([str(adapter), str(tmp_path / "out"), "--base", str(other)]) == 2
    assert "does not fit" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
