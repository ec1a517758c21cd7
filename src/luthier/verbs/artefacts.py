"""What a tuning leaves in its run: what was read, the model, and how it was judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import LuthierError, RenderingError, RunError, TrainingError
from luthier.core.run import Run, write_rows
from luthier.core.types import Example, Text
from luthier.data.preferences import holds_answers
from luthier.text.answers import split_answers
from luthier.verbs.rendering import find_rendered_otherwise, keep_rendering, note_rendering

if TYPE_CHECKING:
    from luthier.verbs.work import Work


def keep_inputs(work: Work, run: Run) -> None:
    """Write what was read: profile, fingerprint, a few rows as the model sees them, how it reads fixed texts."""
    keep_rendering(work, run)
    data = {
        "fingerprint": work.dataset.fingerprint,
        "train": work.feed.rows_an_epoch and len(work.dataset.train),
        "validation": len(work.dataset.validation),
        "test": len(work.dataset.test),
        "dropped": work.dataset.dropped,
        "shape": work.dataset.shape,
    }
    (run.artefacts / "profile.json").write_text(json.dumps(work.dataset.profile, ensure_ascii=False), encoding="utf-8")
    with open(run.artefacts / "samples.jsonl", "w", encoding="utf-8") as file:
        for row in (part for whole in work.rows[:5] for part in split_answers(whole)):
            shown = {"id": row.id, "tokens": work.model.renderer.describe(row), "gold": row.gold}
            file.write(json.dumps(shown, ensure_ascii=False) + "\n")
    lineage = {
        "model": work.config.model,
        "data": str(work.config.data.model_dump(mode="json").get("train")),
        "adapter": work.config.adapter.kind,
    }
    artefacts = {"profile": "artefacts/profile.json", "samples": "artefacts/samples.jsonl"}
    run.update(data=data, lineage=lineage, artefacts=artefacts, numbers={**run.record.numbers, **work.numbers()})


def keep_model(work: Work, run: Run) -> None:
    """Save the tuned model, whole or not at all."""
    from luthier.models.fuse import unfuse
    from luthier.models.save import save_model

    run.events.stage("saving the model")
    unfuse(work.model)
    work.model.spec = work.model.spec.model_copy(update={"learned": work.objective.learned()})
    side, final = run.artefacts / ".model.part", run.artefacts / "model"
    shutil.rmtree(side, ignore_errors=True)
    try:
        save_model(work.model, side)
    except OSError as err:
        shutil.rmtree(side, ignore_errors=True)
        raise RunError(
            f"{final}: the model could not be written ({err.strerror or err}); the checkpoints are whole: "
            f"make room, then `luthier tune --resume run:{run.id}`"
        ) from None
    _check_saved(work, run, side)
    shutil.rmtree(final, ignore_errors=True)
    side.rename(final)
    work.model.spec = work.model.spec.model_copy(update={"source": f"run:{run.id}"})
    artefacts = {**run.record.artefacts, "model": "artefacts/model"}
    if work.model.spec.kind == "decoder" and work.model.spec.learned == "sft":
        from luthier.engine.learned import FILE, write_learned

        # Beside the model, not in it: whoever is given the model is not given the rows.
        write_learned(run.artefacts / FILE, (row.ids for row in work.rows))
        artefacts["learned"] = f"artefacts/{FILE}"
    run.update(artefacts=artefacts)


def _check_saved(work: Work, run: Run, path: Path) -> None:
    """Load what was saved, and compare: a file that holds another model than the one tuned is no result."""
    from luthier.models.load import load_model
    from luthier.training.tripwires import same_model

    try:
        again = load_model(str(path), device=str(work.model.device))
    except RenderingError as err:
        raise TrainingError(f"the saved model was not put into place, and the checkpoints are whole: {err}") from None
    except LuthierError as err:
        run.events.warn(f"the saved model could not be loaded again to compare it: {err}")
        return
    different = find_rendered_otherwise(note_rendering(work, again), work.rendered)
    if different is not None:
        raise TrainingError(
            f"{path}: the saved model reads text otherwise than the tuning did, so it was not put into place: {different}; "
            "the checkpoints are whole; if nothing else changed the tokenizer or the template meanwhile, please report it "
            "with the run's config.yaml"
        )
    if not same_model(work.model, again, work.rows[0].ids):
        raise TrainingError(
            f"{path}: the saved model computes something else than the tuned one, so it was not put into place; the "
            f"checkpoints are whole; please report it with the run's config.yaml"
        )


def judge(work: Work, run: Run) -> None:
    """Evaluate on the test part (else the validation part), beside the baselines; keep every prediction."""
    from luthier.engine.passes import TOKENS
    from luthier.evals.baselines import baselines_for
    from luthier.evals.judge import judge
    from luthier.evals.predict import predict_examples
    from luthier.evals.preferences import judge_answers, read_answers

    examples: Sequence[Example]
    part, examples = ("test", work.dataset.test) if work.dataset.test else ("validation", work.dataset.validation)
    if not examples:
        run.events.warn("nothing was held out, so the tuned model was not judged; give data.test or data.split.test")
        return
    spec, fitting = work.model.spec, baselines_for(work.model.spec.task) if work.config.baselines else ()
    train: Sequence[Example] = work.dataset.train
    if spec.task in ("classify", "regress"):
        # A teacher can be learned from without labels, and nothing can be judged without them.
        train = [one for one in train if not isinstance(one, Text)]
        examples = [one for one in examples if not isinstance(one, Text)]
        fitting = fitting if train else ()
    if not examples:
        run.events.warn(
            "the held-out rows have no labels, so the tuned model was not judged; give data.test with labels"
        )
        return
    run.events.stage(f"judging on {len(examples)} held-out rows")
    found: dict[str, Any] = {}
    if holds_answers(examples):
        logs, fitting = read_answers(work.model, examples, run.events), ()
        predictions, metrics, details, found = judge_answers(examples, logs, work.before, refers=work.objective.refers)
        found = found if work.config.baselines else {}
    else:
        predictions = predict_examples(
            work.model, examples, tokens=min(TOKENS, work.settings.micro_tokens), events=run.events
        )
        metrics, details = judge(predictions, spec.task, spec.labels)
    details["evaluated_on"] = part
    write_rows(run.artefacts / "predictions.jsonl", predictions)
    (run.artefacts / "details.json").write_text(json.dumps(details, ensure_ascii=False), encoding="utf-8")
    for baseline in fitting:
        run.events.stage(f"judging the baseline {baseline.kind}")
        guesses = baseline.predict(train, examples)
        write_rows(run.artefacts / f"predictions-{baseline.kind}.jsonl", guesses)
        found[baseline.kind] = judge(guesses, spec.task, spec.labels)[0]
    artefacts = {"predictions": "artefacts/predictions.jsonl", "details": "artefacts/details.json"}
    run.update(metrics=metrics, baselines=found, artefacts={**run.record.artefacts, **artefacts})
