"""lm-eval tasks: find them by name or in local folders, run them on a model document by document, and compare with a reference in a table.

lm-eval builds the prompts and scores the answers, with the settings of the task's own yaml. Results are stored as one value per document
and metric, so two models can be compared on each document.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertsmith.engine import LoadedModel
from expertsmith.errors import UserError
from expertsmith.evaluation.paired import estimate, pooled
from expertsmith.registry import unknown
from expertsmith.views.progress import Progress

INSTALL = 'pip install "expertsmith[eval]"'
LOCAL = ("json", "csv", "text", "parquet", "arrow", "pandas", "xml", "sql")  # builders of `datasets` that read files
SEED = 1234  # of few-shot examples, lm-eval's default
WINDOWS = 64  # of rolling log-likelihoods, passed at once


@dataclass
class Tasks:
    """lm-eval's tasks by name, the requested groups, and the maximum number of documents per task."""

    tasks: dict[str, Any]
    groups: dict[str, Any]
    limit: int | None


def refuse_missing(folders: Sequence[str | Path]) -> None:
    """Check that tasks can be run, before hours of other work.

    Raises:
        UserError: lm-eval is missing, or a path is not a folder.
    """
    _library()
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"task folder not found: {folder}", "--task-path takes a folder of lm-eval task yamls")


def find(names: Sequence[str], folders: Sequence[str | Path], limit: int | None, progress: Progress) -> Tasks:
    """The tasks with these names (of tasks, groups or tags; a string may hold several with commas), with their documents.

    Tasks in `folders` override lm-eval's own of the same name, and their `data_files` are relative to the yaml.

    Raises:
        UserError: lm-eval is missing, an unknown name, a broken yaml, data that is not available here.
    """
    refuse_missing(folders)
    wanted = list(dict.fromkeys(name.strip() for text in names for name in text.split(",") if name.strip()))
    if not wanted:
        raise UserError("--tasks is empty", "write --tasks hellaswag,arc_easy")
    with _quietly():
        manager = _manager(wanted, folders, progress)
        roots = [Path(folder).resolve() for folder in folders]
        for entry in manager.task_index.values():
            if entry.yaml_path and any(Path(entry.yaml_path).resolve().is_relative_to(root) for root in roots):
                _anchor(entry)
        found = Tasks({}, {}, limit)
        for name in wanted:
            try:
                made = manager.load([name])
            except Exception as error:  # yamls, templates, data readers and the hub client may raise any error
                raise _cannot_load(name, manager.task_index[name], error) from error
            found.tasks |= made["tasks"]
            found.groups |= made["groups"]
    for name, task in found.tasks.items():
        _settle(name, task)
    return found


def _settle(name: str, task: Any) -> None:
    """Refuse a task that cannot be run here; use no few-shot examples if the task does not give a number."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"task {name} runs code that the model writes, which expertsmith does not do", "run it with lm-eval directly"
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name} uses images or sound, but only text is supported")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)


def _manager(wanted: Sequence[str], folders: Sequence[str | Path], progress: Progress) -> Any:
    """lm-eval's task manager with the tasks in `folders`, and with lm-eval's own if these are not enough."""
    from lm_eval.tasks import TaskManager

    for folder in folders:
        _check_yamls(Path(folder))
    paths = [str(folder) for folder in folders]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not all(_complete(manager.task_index, name) for name in wanted):
        progress.note("reading lm-eval's list of tasks (not needed for tasks of --task-path alone)")
        manager = TaskManager(include_path=paths)
    for name in wanted:
        if name not in manager.task_index:
            raise unknown("lm-eval task", name, manager.all_tasks)
    return manager


def settings_of(found: Tasks, name: str) -> dict[str, Any]:
    """Everything that a task's result depends on, apart from the model: version of lm-eval, settings, documents, limit."""
    task = found.tasks[name]
    documents = list(task.eval_docs)[: found.limit]
    if task.get_config("num_fewshot"):
        documents += list(task.fewshot_docs() or ())
    text = json.dumps([task.dump_config(), documents], sort_keys=True, default=_named)
    return {
        "lm_eval": _library().__version__,
        "limit": found.limit,
        "documents": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
    }


def language_model(model: LoadedModel, tokenizer: Any, batch_tokens: int) -> Any:
    """A resident model as lm-eval's HFLM. A batch has at most `batch_tokens` positions with padding, but at least one row."""
    with _quietly():
        from lm_eval.models.huggingface import HFLM

        class Model(HFLM):  # type: ignore[misc]
            cut = 0  # requests longer than the window; lm-eval cuts off their beginning

            def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
                lengths = [len(context) + len(rest) for _, context, rest in requests]
                self.cut += sum(length > self.max_length + 1 for length in lengths)
                self.batch_size_per_gpu = _rows(max(lengths))
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

            def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
                lengths = [
                    len(self.tok_encode(request.args[0])) + request.args[1].get("max_gen_toks", self.max_gen_toks)
                    for request in requests
                ]
                self.cut += sum(length > self.max_length for length in lengths)
                self.batch_size_per_gpu = _rows(max(lengths))
                return super().generate_until(requests, disable_tqdm)

        def _rows(length: int) -> int:
            return max(1, batch_tokens // length)

        return Model(pretrained=model.module, tokenizer=tokenizer, batch_size=WINDOWS)


def answer(found: Tasks, name: str, model: Any, progress: Progress, label: str) -> dict[str, Any]:
    """Run one task on a model (from `language_model`). Returns the value of every metric and filter for every document, a hash of all
    questions, and the number of requests that were cut to the window.

    Raises:
        UserError: lm-eval cannot run this task on this model.
    """
    import lm_eval

    task = found.tasks[name]
    total = len(task.eval_docs) if found.limit is None else min(found.limit, len(task.eval_docs))
    task.set_fewshot_seed(seed=SEED)
    model.cut = 0
    with progress.task(label, total, "documents") as advance, _quietly():
        model.set_cache_hook(_Hook(task, total, advance))
        try:
            result = lm_eval.evaluate(
                model, {"tasks": {name: task}, "groups": {}}, limit=found.limit, bootstrap_iters=0, log_samples=True
            )
        except (MemoryError, OSError, RuntimeError):
            raise
        except Exception as error:  # templates, metrics and functions of the yaml may raise any error
            raise UserError(
                f"lm-eval cannot run task {name}: {_first_line(error)}",
                "check its yaml file, and that the task fits this model",
            ) from error
    values: dict[str, dict[str, Any]] = {}
    asked = hashlib.sha256()
    for sample in result["samples"][name]:
        asked.update("".join(str(sample[key]) for key in ("doc_hash", "prompt_hash", "target_hash")).encode())
        for metric in sample["metrics"]:
            values.setdefault(f"{metric},{sample['filter']}", {})[str(sample["doc_id"])] = _plain(sample[metric])
    return {"asked": asked.hexdigest(), "cut": model.cut, "values": values}


class _Hook:
    """A replacement for lm-eval's cache hook, called for every answered request: reports progress in documents."""

    def __init__(self, task: Any, documents: int, advance: Callable[[float], None]) -> None:
        self.task, self.documents, self.advance = task, documents, advance

    def add_partial(self, kind: str, request: Any, response: Any) -> None:
        """Count one more request."""
        self.advance(self.documents / max(1, len(self.task.instances)))


def table(found: Tasks, mine: Mapping[str, Any], theirs: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row for every task, metric and filter, then for every group with its own score, with the keys of `paired.estimate`.

    Args:
        mine: the results of `answer`, by task; theirs: the reference's.

    Raises:
        UserError: the two got different questions.
    """
    from lm_eval.api.metrics import mean

    rows: list[dict[str, Any]] = []
    for name, task in found.tasks.items():
        if theirs is not None and mine[name]["asked"] != theirs[name]["asked"]:
            raise UserError(f"the two models got different questions in task {name}", "run again with --fresh")
        for key, values in mine[name]["values"].items():
            metric, _, kind = key.partition(",")
            aggregate = task.aggregation().get(metric, mean)
            other = theirs[name]["values"][key] if theirs is not None else None
            if other is not None and other.keys() != values.keys():
                both = [document for document in values if document in other]  # a metric may leave documents out
                values, other = ({document: side[document] for document in both} for side in (values, other))
            rows.append(
                {
                    "task": name,
                    "metric": metric,
                    "filter": kind,
                    "higher_is_better": task.higher_is_better().get(metric),
                    "shots": task.get_config("num_fewshot"),
                    "documents": len(values),
                    "cut": mine[name]["cut"],
                    **estimate(
                        list(values.values()),
                        None if other is None else list(other.values()),
                        None if aggregate is mean else aggregate,
                    ),
                }
            )
    for name, group in found.groups.items():
        rows += _group_rows(name, group, rows)
    return rows


def identity_of(found: Tasks) -> str:
    """A hash of everything that the answers depend on, apart from the model."""
    text = json.dumps({name: settings_of(found, name) for name in found.tasks}, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def scores(found: Tasks, model: LoadedModel, tokenizer: Any, batch_tokens: int, progress: Progress) -> dict[str, float]:
    """One score of a loaded model for every task, and for every group with its own score: the first metric for which higher is better,
    under `task metric`.

    Raises:
        UserError: a task without such a metric, or one that cannot be run on this model.
    """
    for index in range(len(model.layers)):
        model.bring(index)
    wrapped = language_model(model, tokenizer, batch_tokens)
    rows = table(found, {name: answer(found, name, wrapped, progress, name) for name in found.tasks}, None)
    made: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["higher_is_better"] and row["value"] is not None:
            made.setdefault(row["task"], row)
    for name in found.tasks:
        if name not in made:
            raise UserError(f"task {name} has no metric where higher is better", "remove it from the comparison")
    return {f"{name} {row['metric']}": row["value"] for name, row in made.items()}


def _group_rows(name: str, group: Any, rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    members = {task.task_name for task in group.get_all_tasks()}
    for wanted in group.aggregate_metric_list or ():
        of_metric = [row for row in rows if row["task"] in members and row["metric"] == wanted.metric]
        for kind in wanted.filter_list or sorted({row["filter"] for row in of_metric}):
            parts = [row for row in of_metric if row["filter"] == kind]
            if not parts or callable(wanted.aggregation):  # a group's own aggregation has no error that follows from its parts
                continue
            weights = [row["documents"] if wanted.weight_by_size else 1 for row in parts]
            yield {
                "task": name,
                "metric": wanted.metric,
                "filter": kind,
                "higher_is_better": parts[0]["higher_is_better"],
                "shots": None,
                "documents": sum(row["documents"] for row in parts),
                "cut": sum(row["cut"] for row in parts),
                **pooled([dict(row) for row in parts], weights),
            }


def _library() -> Any:
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError("--tasks needs lm-eval", INSTALL) from None
    return lm_eval


def _check_yamls(folder: Path) -> None:
    """Refuse yamls that cannot be read; lm-eval would skip them and report an unknown task."""
    from lm_eval.tasks._yaml_loader import load_yaml
    from yaml import YAMLError

    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except YAMLError as error:
            raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
        except (OSError, ValueError) as error:  # a missing or circular include, or a yaml that is no table
            raise UserError(f"{path} is not a task: {_first_line(error)}") from None


def _complete(index: Mapping[str, Any], name: str) -> bool:
    """Whether a task, or a group with all of its members, is in the index."""
    entry = index.get(name)
    if entry is None:
        return False
    members = (entry.cfg or {}).get("task") if "group" in (entry.cfg or {}) else None
    names = [member for member in members or () if isinstance(member, str)] if isinstance(members, list) else []
    return all(_complete(index, member) for member in names)


def _anchor(entry: Any) -> None:
    """Make relative `data_files` of a local task relative to its yaml (lm-eval uses the working directory)."""
    from lm_eval.tasks._yaml_loader import load_yaml

    if not ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files"):
        return
    folder = Path(entry.yaml_path).resolve().parent

    def beside(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: beside(part) for key, part in value.items()}
        if isinstance(value, list):
            return [beside(part) for part in value]
        return value if "://" in str(value) else str(folder / str(value))

    try:
        config = load_yaml(entry.yaml_path)
    except Exception as error:  # a Python function of the yaml that cannot be imported
        raise UserError(f"{entry.yaml_path} is not a task: {_first_line(error)}") from error
    options = config["dataset_kwargs"]
    entry.cfg = {**config, "dataset_kwargs": {**options, "data_files": beside(options["data_files"])}}
    entry.yaml_path = None


def _cannot_load(name: str, entry: Any, error: Exception) -> UserError:
    """The error for a task that cannot be built, because of unavailable data or its yaml."""
    config = entry.cfg or {}
    source = config.get("dataset_path")
    read = type(error).__name__ == "DatasetGenerationError" and isinstance(error.__cause__, Exception)
    reason = _first_line(error.__cause__ if read else error)  # type: ignore[arg-type]
    out_of_reach = isinstance(error, (OSError, ModuleNotFoundError)) or "Offline" in type(error).__name__
    if out_of_reach and source in LOCAL:
        return UserError(f"the data of task {name} cannot be read: {reason}", "put data_files next to the task's yaml")
    if out_of_reach and entry.yaml_path is not None:
        splits = [config[key] for key in ("training_split", "validation_split", "test_split") if config.get(key)]
        files = ", ".join(f"{split}: FILE.jsonl" for split in splits) or "<split>: FILE.jsonl"
        what = f"the data set {source} of the hub" if source else "data sets of the hub"
        return UserError(
            f"task {name} needs {what}, which is not available here: {reason}",
            "download it on a machine with network and copy the Hugging Face cache (HF_HOME), or give the documents as a file: a folder for --task-path with "
            f"a yaml that says `include: {Path(entry.yaml_path).resolve()}`, a new task name, `dataset_path: json` and "
            f"`dataset_kwargs: {{data_files: {{{files}}}}}`",
        )
    return UserError(f"task {name} cannot be built: {reason}", "check its yaml file")


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Suppress output, logs and progress bars of lm-eval and its libraries: stdout is for results, and progress is shown by expertsmith."""
    import datasets
    from tqdm import tqdm

    names = ("lm_eval", "datasets", "huggingface_hub", "transformers", "evaluate")
    levels = {name: logging.getLogger(name).level for name in names}
    bars, init = datasets.is_progress_bar_enabled(), tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **{**kwargs, "disable": True})

    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    tqdm.__init__ = hidden
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.__init__ = init
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def _plain(value: Any) -> Any:
    """A document's value with types that JSON supports."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _named(value: Any) -> str:
    """A name, without memory address, for objects in a task's settings that JSON does not support."""
    return str(getattr(value, "__qualname__", None) or type(value).__name__)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
