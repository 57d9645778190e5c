"""Checkpoints that are whole or absent: saved into a temporary folder, listed in a manifest, then renamed."""

import json
import logging
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from prefopt.data.write import file_digest
from prefopt.errors import RunError, UserError

logger = logging.getLogger(__name__)

MANIFEST = "prefopt_manifest.json"
# Trainer's patterns for checkpoints, a regular expression and a glob, do not match this name.
PARTIAL = ".partial-checkpoint"
# of one process; of FSDP's shards; of DeepSpeed
OPTIMIZERS = ("optimizer.pt", "optimizer.bin", "optimizer_*", "pytorch_model_fsdp*", "global_step*")


class CheckpointError(UserError):
    """A checkpoint that training cannot continue from."""


def remove_partial(run_dir: str | Path) -> None:
    """Remove what a killed process left of a checkpoint that it was saving, replacing or deleting."""
    folder = Path(run_dir) / PARTIAL
    if folder.exists():
        shutil.rmtree(folder)


def problem_of(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is missing, truncated or changed, in words; None for a whole one.

    A checkpoint without a manifest, of transformers' Trainer or of an earlier version, has to have its optimizer and
    files that can be opened.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    try:
        files = _listed(checkpoint)
    except FileNotFoundError:
        return _problem_without_manifest(checkpoint)
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, expected in files.items():  # sizes first: they cost nothing
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes; expected {expected['bytes']}"
    for name, (digest, _) in zip(files, _digests(checkpoint, files), strict=True):
        if digest != files[name]["sha256"]:
            return f"{name} has changed since it was saved (its sha256 differs)"
    return None


def _listed(checkpoint: Path) -> dict[str, dict]:
    """{file: its size and digest}; ``ValueError`` for a manifest that is none."""
    content = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    files = content.get("files") if isinstance(content, dict) else None
    if (
        not isinstance(files, dict)
        or TRAINER_STATE_NAME not in files
        or not all(isinstance(one, dict) and {"bytes", "sha256"} <= one.keys() for one in files.values())
    ):
        raise ValueError("it does not list the files of a checkpoint with sizes and digests")
    return files


def _problem_without_manifest(checkpoint: Path) -> str | None:
    """What can be seen without digests: that files are there and can be opened."""
    if not (checkpoint / TRAINER_STATE_NAME).is_file():
        return f"{MANIFEST} and {TRAINER_STATE_NAME} are missing"
    if not any(list(checkpoint.glob(pattern)) for pattern in OPTIMIZERS):
        return f"{MANIFEST} and optimizer.pt are missing, so training would continue with other weights"
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
                return f"{path.name} is truncated or changed"
        except (OSError, ValueError, SafetensorError) as error:
            return f"{path.name} cannot be read ({error})"
    return None


def newest_whole(run_dir: str | Path) -> Path | None:
    """The whole checkpoint with the most steps, or None if there is no checkpoint; logs those that are passed over.

    Raises:
        CheckpointError: there are checkpoints, and none of them is whole.
    """
    found = [path for path in map(Path, sort_checkpoints(str(run_dir))) if _is_checkpoint(path)]
    problems: list[str] = []
    for checkpoint in reversed(found):
        problem = problem_of(checkpoint)
        if problem is None:
            for line in problems:
                logger.warning("passed over %s; resuming from %s", line, checkpoint.name)
            return checkpoint
        problems.append(f"{checkpoint.name}: {problem}")
    if problems:
        raise CheckpointError(
            f"{run_dir} has no whole checkpoint to resume from ({'; '.join(problems)}); remove "
            f"{'it' if len(problems) == 1 else 'them'} to start from the beginning"
        )
    return None


class ResumableTrainer(Trainer):
    """A Trainer whose checkpoints are whole or absent, and verified before training resumes from one."""

    _partial: Path | None = None  # replaces the run folder during a save
    _verified: str | None = None  # by a call before ``train``, which need not read it all again

    def _checkpoint_files(self) -> dict[str, str]:
        """Texts to save beside Trainer's files, by name; called by every process."""
        return {}

    def _get_output_dir(self, trial: object) -> str:
        return super()._get_output_dir(trial) if self._partial is None else str(self._partial)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Trainer's, into a temporary folder that becomes ``checkpoint-N`` once all of it is on disk.

        Raises:
            RunError: the checkpoint cannot be written; the ones before it are untouched.
        """
        run_dir = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        files, saves = self._checkpoint_files(), self.args.should_save
        try:
            if saves:
                remove_partial(run_dir)
                (run_dir / PARTIAL / name).mkdir(parents=True)
                for file, text in files.items():
                    (run_dir / PARTIAL / name / file).write_text(text, encoding="utf-8")
            self.accelerator.wait_for_everyone()
            self._partial = run_dir / PARTIAL
            super()._save_checkpoint(model, trial)
            self._name_best(run_dir, name)
            self.accelerator.wait_for_everyone()
            if saves:
                _publish(run_dir / PARTIAL / name, run_dir / name)
                self._rotate(run_dir)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError
            if saves:
                shutil.rmtree(run_dir / PARTIAL, ignore_errors=True)
            before = sort_checkpoints(str(run_dir))
            last = f"the last one is {Path(before[-1]).name}" if before else "there is none before it"
            raise RunError(
                f"{run_dir / name} could not be saved ({' '.join(str(error).split())}); {last}. Check the free space, "
                "then resume the run"
            ) from error
        finally:
            self._partial = None
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(run_dir / name))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer calls this during the save; the push follows it, from the folder's final place."""

    def _name_best(self, run_dir: Path, name: str) -> None:
        """Record the best checkpoint under its final path, where Trainer has the temporary one or found none."""
        if not self.state.best_global_step:
            return
        best = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        path = str(run_dir / best)
        if (best == name or os.path.isdir(path)) and self.state.best_model_checkpoint != path:
            self.state.best_model_checkpoint = path
            if self.args.should_save:
                self.state.save_to_json(str(run_dir / PARTIAL / name / TRAINER_STATE_NAME))

    def _rotate(self, run_dir: Path) -> None:
        """Trainer's rotation; a checkpoint is renamed first, so that a kill never leaves half of one."""
        limit = self.args.save_total_limit
        checkpoints = sort_checkpoints(str(run_dir), use_mtime=True)
        if not limit or limit < 0:
            return
        kept = {checkpoints[-1], self.state.best_model_checkpoint}
        others = [path for path in checkpoints if path not in kept]
        for path in others[: max(0, len(checkpoints) - limit)]:
            (run_dir / PARTIAL).mkdir(exist_ok=True)
            os.rename(path, run_dir / PARTIAL / Path(path).name)
        remove_partial(run_dir)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """Trainer's; what it resumes from is verified first, and ``True`` is the newest whole checkpoint.

        Raises:
            CheckpointError: a file of the checkpoint is missing, truncated or changed.
        """
        checkpoint = self.verified(cast(str | Literal[True] | None, resume_from_checkpoint or None))
        self._verified = None
        with self._training(checkpoint):
            if self.args.should_save:
                remove_partial(str(self.args.output_dir))
            return super().train(checkpoint, *args, **kwargs)

    def _training(self, checkpoint: str | None) -> AbstractContextManager:
        """Surrounds Trainer's ``train``; until here nothing is written, and the checkpoint, if any, is verified."""
        return nullcontext()

    def _run_epoch(self, *args, **kwargs) -> None:
        """Trainer's, which would take a step more when a checkpoint already has all of them."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def verified(self, checkpoint: str | Literal[True] | None) -> str | None:
        """The path of a checkpoint that training can continue from; ``True`` is the newest whole one. Writes nothing.

        Raises:
            CheckpointError: a file of it is missing, truncated or changed.
        """
        if checkpoint is None or checkpoint == self._verified:
            return checkpoint
        result: list = [None, None]  # path, error
        if self.is_world_process_zero():
            try:
                result[0] = str(_find(checkpoint, str(self.args.output_dir)))
            except CheckpointError as error:
                result[1] = str(error)
        broadcast_object_list(result, from_process=0)
        path, problem = result
        if problem is not None:
            raise CheckpointError(problem)
        self._verified = path
        return path


def _find(checkpoint: str | Literal[True], output_dir: str) -> Path:
    if checkpoint is True:
        path = newest_whole(output_dir)
        if path is None:
            raise CheckpointError(f"{output_dir} has no checkpoint to resume from")
    else:
        path = Path(checkpoint)
        problem = problem_of(path)
        if problem is not None:
            raise CheckpointError(f"{path} cannot be resumed from: {problem}; choose another checkpoint")
    if not (path / MANIFEST).is_file():
        logger.warning(
            "%s has no %s: prefopt did not save it, or an earlier version did, so its files are not verified",
            path,
            MANIFEST,
        )
    return path


def _publish(partial: Path, final: Path) -> None:
    """Write the manifest, wait for the disk, and rename."""
    names = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
    for name in names:
        _sync(partial / name)
    files = {
        name: {"bytes": size, "sha256": digest}
        for name, (digest, size) in zip(names, _digests(partial, names), strict=True)
    }
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    _sync(manifest)
    folders = [path for path in partial.rglob("*") if path.is_dir()]
    for folder in (*folders, partial):
        _sync(folder)
    if final.exists():  # saved before by the run that this one repeats
        os.rename(final, partial.with_name(f"replaced-{final.name}"))
    os.rename(partial, final)
    _sync(final.parent)
    remove_partial(final.parent)


def _digests(folder: Path, names) -> list[tuple[str, int]]:
    """(sha256, bytes) of each file; in threads, since hashing releases the interpreter's lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: file_digest(folder / name), names))


def _sync(path: Path) -> None:
    """Wait until a file, or on POSIX systems a folder's list of files, is on disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_checkpoint(path: Path) -> bool:
    return path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-").isdigit()
