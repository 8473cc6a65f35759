"""Run tasks of lm-evaluation-harness with our model class and with the harness's own, in a process of its own.

    python tests/support/harness_comparison.py DENSE_FOLDER CODEBOOK_FILE FOLDER

Prints one line of JSON: the data; for each model the answers to all requests of each task in order, and the harness's results;
and what `evaluate_tasks` gives. FOLDER gets the tasks and their data.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from cluscomp_export.evaluation.harness import ClusCompLM, evaluate_tasks

ROWS = [
    {
        "story": "Lily had a red ball. She loved to play with the",
        "endings": ["ball.", "ball and the big dog.", "x"],
        "label": 0,
    },
    {"story": "Once upon a time, there was a ", "endings": ["little girl.", "boy named Tim.", "quite odd ending."], "label": 1},
    {"story": "", "endings": ["Once upon a time", "upon Once time a", "time"], "label": 0},
    {"story": "They went to the park and saw a bird. " * 40, "endings": ["The bird was happy.", "The end"], "label": 0},
]
METRIC = {"aggregation": "mean", "higher_is_better": True}
TASKS: dict[str, dict[str, Any]] = {
    "local_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{story}}",
        "doc_to_choice": "endings",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", **METRIC}, {"metric": "acc_norm", **METRIC}],
    },
    "local_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{story * 3 + endings[0]}}",
        "metric_list": [{"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
    "local_text": {
        "output_type": "generate_until",
        "doc_to_text": "Once upon a time, {{story[:20]}}",
        "doc_to_target": "{{endings[0]}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "bypass"}],
    },
}


def main() -> None:
    dense, codebook, folder = map(Path, sys.argv[1:])
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    files = []
    for name, settings in TASKS.items():
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump({"task": name, **common, **settings}))
    tasks = [yaml.safe_load(file.read_text()) for file in files]
    models = {"ours": ClusCompLM(dense), "theirs": HFLM(pretrained=str(dense), device="cpu", dtype="float32", batch_size=2)}
    # Looking through the thousands of tasks that come with the harness takes longer than all else.
    manager = TaskManager(include_defaults=False)
    answer: dict[str, Any] = {"rows": ROWS}
    for name, model in models.items():
        found = simple_evaluate(model, tasks=[dict(task) for task in tasks], task_manager=manager, bootstrap_iters=0)
        samples = {task: [sample["resps"] for sample in rows] for task, rows in found["samples"].items()}
        answer[name] = {"samples": samples, "results": found["results"]}
    answer["codebook"] = vars(evaluate_tasks(codebook, [str(files[0])], limit=2))
    print(json.dumps(answer, default=str))


if __name__ == "__main__":
    main()
