"""A build -> datasets, models, a kernel that ran, a submission with its score.

Nothing here is remembered between two runs: each step first asks the server what is there, so
the same command goes on where the last one stopped and pushes nothing twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kit import files
from kit.kaggle import check, kernels, manifest, models
from kit.kaggle.client import Clock, KaggleError
from kit.kaggle.datasets import bring
from kit.kaggle.server import Server
from kit.kaggle.timeouts import Limits

RESULT = "submission.csv"


@dataclass(frozen=True)
class Published:
    """What is on Kaggle now."""

    datasets: dict[str, int] = field(default_factory=dict)  # version by owner/slug
    kernel: str = ""  # owner/slug/version
    outputs: tuple[Path, ...] = ()
    public_score: str = ""
    private_score: str = ""
    models: dict[str, int] = field(default_factory=dict)  # version by variation


def publish(
    build: Path,
    output: Path,
    *,
    datasets: bool = False,
    model: bool = False,
    kernel: bool = False,
    submit: str = "",
    again: bool = False,
    clock: Clock | None = None,
    limits: Limits | None = None,
    say: Callable[[str], None] = print,
) -> Published:
    """Brings a build to Kaggle as far as asked, and its kernel's output to `output`.

    datasets: send those that differ from the server's; without it they must not differ.
    model: the networks as a Kaggle model, too; asked for alone, nothing else is looked at.
    kernel: push it and wait for its end. submit: the message of a competition entry, which
    needs the kernel. again: push the kernel although the same one is there.
    Raises ValueError for a build that Kaggle would refuse, KaggleError for all else.
    """
    check.refuse(build)
    server = Server(clock or Clock(), say, limits)
    networks = models.bring(server, build) if model else {}
    if model and not (datasets or kernel or submit):
        return Published(models=networks)
    versions = bring(server, build, send=datasets)
    if not (kernel or submit):
        return Published(versions, models=networks)
    ref, version = kernels.push(server, build, versions, again)
    kernels.run(server, ref, version)
    outputs = kernels.fetch(server, ref, version, output)
    done = Published(versions, f"{ref}/{version}", outputs, models=networks)
    if not submit:
        return done
    if output / RESULT not in outputs:
        raise KaggleError(f"kernel {ref}: wrote no {RESULT}, so nothing was submitted")
    competition = manifest.read(build).competition
    scores = _submit(server, competition, ref, version, submit)
    return replace(done, public_score=scores[0], private_score=scores[1])


def plan(build: Path) -> str:
    """What would be sent; asks nobody. Refuses what `publish` would."""
    check.refuse(build)
    lines = [manifest.table(build), ""]
    for folder in manifest.datasets(build):
        ref = files.read_json(folder / manifest.DATASET)["id"]
        lines.append(f"dataset {ref}: sent unless the server has these parts")
    for folder in manifest.variations(build):
        about = files.read_json(folder / manifest.VARIATION)
        place = (
            about[it] for it in ("ownerSlug", "modelSlug", "framework", "instanceSlug")
        )
        lines.append(f"model {'/'.join(place)}: sent with --model, unless it is there")
    kernel = files.read_json(build / manifest.SUBMISSION / manifest.KERNEL)
    shape = kernel.get("machine_shape") or "no accelerator"
    internet = "with" if kernel["enable_internet"] else "without"
    lines.append(f"kernel {kernel['id']}: on {shape}, {internet} internet")
    lines.append(f"competition {manifest.read(build).competition}")
    return "\n".join(lines)


def _submit(
    server: Server, competition: str, ref: str, version: int, message: str
) -> tuple[str, str]:
    """Enters the kernel's version once, and waits for its scores: public, private."""
    message = f"{message} (version {version})"  # by which a second run knows it
    number = server.submissions(competition).get(message)
    if number:
        server.say(f"competition {competition}: {message!r} was submitted already")
    else:
        number = server.submit(competition, ref, version, RESULT, message)
        server.say(f"competition {competition}: submitted {message!r}")

    def look() -> Any:
        found = server.submission(number)
        return None if found.status.name == "PENDING" else found

    found = server.poll(f"submission {number}", look)
    if found.status.name == "ERROR":
        cause = server.redact(found.error_description or "no message")
        raise KaggleError(f"competition {competition}: {message!r} failed: {cause}")
    scores = found.public_score or "", found.private_score or ""
    server.say(
        f"score: public {scores[0] or 'hidden'}, private {scores[1] or 'hidden'}"
    )
    return scores
