"""lm-eval asks the server, and gets what the engine in this process finds."""

import json
import os
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from luthier.core.events import Events
from luthier.engine.generate import choose_engine, generate
from luthier.engine.sampling import Sampling
from luthier.models.load import load_model
from running import Running

pytestmark = pytest.mark.e2e
# An environment of its own may hold it: the path of its program.
PROGRAM = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
ROWS = [
    {"q": "The sky is", "choices": ["blue", "a fish", "made of wood"], "gold": 0},
    {"q": "Once upon a", "choices": ["time", "carpet", "the"], "gold": 0},
    {"q": "She went to the", "choices": ["shop to buy bread", "of", "park"], "gold": 2},
]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.skipif(
    PROGRAM is None, reason="lm_eval is not installed; pip install 'lm_eval[api]', or set LM_EVAL to its path"
)
def test_likelihoods_are_those_of_the_engine(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tiny.yaml").write_text(TASK.format(rows=rows))
    served = Running("mini", runs=tmp_path / "runs")
    tokenizer = Path(str(files("luthier"))) / "assets" / "mini"
    settings = f"model=mini,base_url={served.url}/v1/completions,tokenizer_backend=huggingface,tokenizer={tokenizer}"
    command = [str(PROGRAM), "run", "--model", "local-completions", "--model_args", f"{settings},num_concurrent=3"]
    command += [
        "--tasks",
        "tiny",
        "--include_path",
        str(tmp_path),
        "--log_samples",
        "--output_path",
        str(tmp_path / "out"),
    ]
    try:
        subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, timeout=300)
    finally:
        served.stop()
    (samples,) = tmp_path.glob("out/**/samples*.jsonl")
    model = load_model("mini", as_stored=True)
    choose_engine(model, Sampling(), "auto", Events())
    compared = 0
    for sample in map(json.loads, samples.read_text().splitlines()):
        for choice, found in zip(sample["doc"]["choices"], sample["resps"]):
            context, whole = sample["doc"]["q"], f"{sample['doc']['q']} {choice}"
            start = len(model.tokenizer(context, add_special_tokens=False)["input_ids"])
            own = generate(model, [whole], Sampling(max_tokens=1, prompt_logprobs=True), raw=True)[0]
            assert float(found[0][0]) == pytest.approx(sum(own.prompt_logprobs[start - 1 :]), abs=1e-9)
            compared += 1
    assert compared == 9
