import pytest
import tiny
from hub_runs import finished, saved
from hub_stand_in import HubStandIn
from warm import WarmPython


USERS = {
    "hf_write": {"name": "ann", "role": "write", "orgs": ["team"]},
    "hf_read": {"name": "ann", "role": "read"},
    "hf_fine": {"name": "bob", "role": "fineGrained"},
    "hf_elsewhere": {
        "name": "bob",
        "role": "fineGrained",
        "fineGrained": {
            "global": [],
            "scoped": [
                {"entity": {"type": "user", "name": "bob"}, "permissions": ["repo.content.read"]},
                {"entity": {"type": "model", "name": "bob/one"}, "permissions": ["repo.write"]},
            ],
        },
    },
}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = tiny.byte_level_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    teacher = saved(folder / "my_teacher", tiny.qwen2, tiny.sentencepiece_tokenizer())
    return saved(folder / "my_student", tiny.gpt2, tokenizer), teacher


@pytest.fixture(scope="session")
def made(tmp_path_factory, models):
    """Runs to be copied, not to be changed."""
    folder = tmp_path_factory.mktemp("runs")
    measured = {"eval_on_start": True, "eval_generation_samples": 2, "save_strategy": "steps", "save_steps": 1}
    return {
        "full": finished(folder / "full", *models, method="dskd_cma_ga", analysis_steps=0, analysis_examples=2),
        "adapter": finished(folder / "adapter", *models, adapter=True, method="dskd_cma", **measured),
        "sft": finished(folder / "sft", *models, method="sft"),
    }


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The stand-in of the hub, and a Python whose hub that is; nobody is logged in there."""
    with HubStandIn() as stand_in:
        environment = stand_in.environment(tmp_path_factory.mktemp("home"), token=None)
        with WarmPython({**environment, "OMP_NUM_THREADS": "1"}) as python:
            yield stand_in, python


@pytest.fixture
def hub(served, models):
    """It holds a pair of models and data, and has been asked for nothing."""
    stand_in, _ = served
    stand_in.clear(USERS)
    terms = {"license": "other", "license_name": "tiny-terms", "license_link": "TERMS.md"}
    stand_in.add("base/gpt2-tiny", models[0], card=terms)
    stand_in.add("base/qwen-tiny", models[1], card={"license": "mit"})
    stand_in.add("base/rows", {"rows.jsonl": b"{}"}, "dataset", card={"license": "cc-by-sa-3.0"})
    return stand_in
