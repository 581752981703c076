"""What is asked of Kaggle: datasets, kernels, submissions; answers are read field by field."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import files
from kit.kaggle import uploads
from kit.kaggle.client import filled
from kit.kaggle.variations import NOTES, Variations

OUTPUT_BYTES = 20_000_000_000  # of /kaggle/working


@dataclass(frozen=True)
class Kernel:
    """The newest version of a kernel on the server."""

    version: int
    source: str
    sources: frozenset[str]  # datasets as owner/slug, competitions by slug


class Server(Variations):
    """Kaggle, as the signed-in user sees it."""

    # datasets

    def dataset_status(self, ref: str) -> str | None:
        """In small letters, such as ready; None when there is no such dataset of ours."""
        return self.ask(
            f"dataset {ref}",
            lambda: self.api.dataset_status(ref),
            absent=(403, 404),  # a dataset that is not there may answer either
        )

    def dataset_version(self, ref: str) -> int:
        from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

        owner, slug = ref.split("/")
        request = filled(ApiGetDatasetRequest(), owner_slug=owner, dataset_slug=slug)
        path = "datasets.dataset_api_client.get_dataset"
        return self.call(f"dataset {ref}", path, request).current_version_number or 0

    def dataset_files(self, ref: str, version: int) -> dict[str, int]:
        """Bytes of every file of a version, by name."""
        doing, found = f"dataset {ref}: its files", {}

        def ask(token: str) -> Any:
            return self.ask(
                doing,
                lambda: self.api.dataset_list_files(
                    f"{ref}/{version}", page_token=token or None, page_size=200
                ),
            )

        for page in self.pages(doing, ask):
            if page.error_message:
                raise self.error(doing, page.error_message)
            found |= {it.name: it.total_bytes for it in page.dataset_files or []}
        return found

    def dataset_file(self, ref: str, version: int, name: str) -> bytes | None:
        """The content of a small file of a version; None when it has none."""
        from kagglesdk.datasets.types.dataset_api_service import (
            ApiDownloadDatasetRequest,
        )

        owner, slug = ref.split("/")
        request = filled(
            ApiDownloadDatasetRequest(),
            owner_slug=owner,
            dataset_slug=slug,
            dataset_version_number=version,
            file_name=name,
        )
        path = "datasets.dataset_api_client.download_dataset"
        how = {"read": self.receive_small, "absent": (403, 404)}
        return self.call(f"dataset {ref}: {name}", path, request, **how)

    def create_dataset(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """A new private dataset from the files of a folder; all of them, or an error."""
        from kagglesdk.datasets.types.dataset_api_service import ApiCreateDatasetRequest

        ref = metadata["id"]
        owner, slug = ref.split("/")
        with uploads.uploaded(self, f"dataset {ref}", folder) as sent:
            request = filled(
                ApiCreateDatasetRequest(),
                **_described(metadata),
                owner_slug=owner,
                slug=slug,
                title=metadata["title"],
                license_name=metadata["licenses"][0]["name"],
                is_private=True,
                files=sent,
            )
            answer = self.call(
                f"dataset {ref}: create",
                "datasets.dataset_api_client.create_dataset",
                request,
                arrived=lambda: self.dataset_status(ref),
            )
            self.made(answer, f"dataset {ref}")

    def create_version(
        self, folder: Path, metadata: Mapping[str, Any], before: int
    ) -> None:
        """The version after `before`, from the files of a folder; they replace all others."""
        from kagglesdk.datasets.types.dataset_api_service import (
            ApiCreateDatasetVersionRequest,
            ApiCreateDatasetVersionRequestBody,
        )

        ref = metadata["id"]
        owner, slug = ref.split("/")
        with uploads.uploaded(self, f"dataset {ref}", folder) as sent:
            body = filled(
                ApiCreateDatasetVersionRequestBody(),
                **_described(metadata),
                version_notes=NOTES,
                files=sent,
            )
            request = filled(
                ApiCreateDatasetVersionRequest(),
                owner_slug=owner,
                dataset_slug=slug,
                body=body,
            )
            answer = self.call(
                f"dataset {ref}: new version",
                "datasets.dataset_api_client.create_dataset_version",
                request,
                arrived=lambda: self.dataset_version(ref) > before or None,
            )
            self.made(answer, f"dataset {ref}")

    # kernels

    def kernel(self, ref: str) -> Kernel | None:
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

        owner, slug = ref.split("/")
        request = filled(ApiGetKernelRequest(), user_name=owner, kernel_slug=slug)
        path = "kernels.kernels_api_client.get_kernel"
        found = self.call(f"kernel {ref}", path, request, absent=(403, 404))
        if found is None:
            return None
        held = found.metadata
        datasets = [
            "/".join(it.split("/")[:2]) for it in held.dataset_data_sources or []
        ]
        sources = frozenset([*datasets, *(held.competition_data_sources or [])])
        return Kernel(held.current_version_number or 0, found.blob.source, sources)

    def push(self, ref: str, folder: Path, arrived: Callable[[], Any]) -> Any:
        """What SaveKernel answers, its `error` unread; or what `arrived` found."""
        return self.ask(
            f"kernel {ref}: push",
            lambda: self.api.kernels_push(str(folder)),
            arrived=arrived,
        )

    def kernel_status(self, ref: str, version: int) -> tuple[str, str]:
        """State, such as QUEUED or COMPLETE, and the failure message."""
        from kagglesdk.kernels.types.kernels_api_service import (
            ApiGetKernelSessionStatusRequest,
        )

        owner, slug = ref.split("/")
        request = filled(
            ApiGetKernelSessionStatusRequest(),
            user_name=owner,
            kernel_slug=slug,
            version_label=f"v{version}",
        )
        path = "kernels.kernels_api_client.get_kernel_session_status"
        answer = self.call(f"kernel {ref}: status", path, request)
        return answer.status.name, answer.failure_message or ""

    def kernel_output(self, ref: str, version: int) -> tuple[dict[str, str], str]:
        """URL of every output file by name, and the log as plain text."""
        from kagglesdk.kernels.types.kernels_api_service import (
            ApiListKernelSessionOutputRequest,
        )

        owner, slug = ref.split("/")
        doing, urls, log = f"kernel {ref}: output", {}, ""

        def ask(token: str) -> Any:
            request = filled(
                ApiListKernelSessionOutputRequest(),
                user_name=owner,
                kernel_slug=slug,
                page_token=token,
                page_size=200,
                version_label=f"v{version}",
            )
            path = "kernels.kernels_api_client.list_kernel_session_output"
            return self.call(doing, path, request)

        for page in self.pages(doing, ask):
            log = log or page.log or ""
            for it in page.files or []:
                if it.file_name in urls:
                    raise self.error(doing, f"{it.file_name!r} stands there twice")
                urls[it.file_name] = it.url
        return urls, self.redact(_plain_log(log))

    def fetch(self, url: str, path: Path) -> Path:
        """Downloads an output file; whole or not at all."""

        import requests

        plain = {"Accept-Encoding": "identity"}

        def download() -> Path:
            with requests.get(url, stream=True, headers=plain) as answer:
                answer.raise_for_status()
                with files.replacing(path) as part, part.open("wb") as out:
                    for chunk in self.receive(answer, OUTPUT_BYTES):
                        out.write(chunk)
            return path

        return self.ask(f"output {path.name}", download)

    # competitions

    def submissions(self, competition: str) -> dict[str, int]:
        """Reference number of the newest submissions, by description."""
        found = self.ask(
            f"competition {competition}: submissions",
            lambda: self.api.competition_submissions(competition, page_size=100),
        )
        return {it.description: it.ref for it in reversed(found or [])}

    def submit(
        self, competition: str, ref: str, version: int, file: str, message: str
    ) -> int:
        """Enters a kernel version's file; its reference number."""
        answer = self.ask(
            f"competition {competition}: submit",
            lambda: self.api.competition_submit_code(
                file, message, competition, ref, version, quiet=True
            ),
            arrived=lambda: self.submissions(competition).get(message),
        )
        if isinstance(answer, int):
            return answer
        number = answer.ref or self.submissions(competition).get(message)
        if not number:
            raise self.error(f"competition {competition}: submit", answer.message)
        return number

    def submission(self, number: int) -> Any:
        """State, scores and error of a submission, as the client gives them."""
        from kagglesdk.competitions.types.competition_api_service import (
            ApiGetSubmissionRequest,
        )

        request = filled(ApiGetSubmissionRequest(), ref=number)
        path = "competitions.competition_api_client.get_submission"
        return self.call(f"submission {number}", path, request)


def _described(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "subtitle": metadata.get("subtitle"),
        "description": metadata.get("description"),
        "category_ids": metadata.get("keywords", []),
    }


def _plain_log(log: str) -> str:
    """Kaggle's log, a JSON list of {stream_name, time, data}, as text."""
    try:
        return "".join(str(event["data"]) for event in json.loads(log))
    except (ValueError, TypeError, KeyError):
        return log
