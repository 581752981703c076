"""What is asked of Kaggle about models, whose variations are named owner/model/framework/variation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit.kaggle import uploads
from kit.kaggle.client import Client, filled

NOTES = "published by landmark-kit"  # of a new version


class Variations(Client):
    """Models and their variations, as the signed-in user sees them."""

    def has_model(self, ref: str) -> bool:
        owner, model = ref.split("/")
        request = _of_models("ApiGetModelRequest", owner_slug=owner, model_slug=model)
        found = self._models(f"model {ref}", "get_model", request, absent=(403, 404))
        return found is not None

    def create_model(self, metadata: Mapping[str, Any]) -> None:
        """A new private model, still without variations."""
        ref = f"{metadata['ownerSlug']}/{metadata['slug']}"
        request = _of_models(
            "ApiCreateModelRequest",
            owner_slug=metadata["ownerSlug"],
            slug=metadata["slug"],
            title=metadata["title"],
            subtitle=metadata["subtitle"],
            description=metadata["description"],
            is_private=True,
        )
        answer = self._models(
            f"model {ref}: create",
            "create_model",
            request,
            arrived=lambda: self.has_model(ref) or None,
        )
        self.made(answer, f"model {ref}")

    def variation(self, name: str) -> int:
        """Its newest version; 0 when there is none."""
        request = _of_models("ApiGetModelInstanceRequest", **_place(name))
        method = "get_model_instance"
        found = self._models(f"model {name}", method, request, absent=(403, 404))
        return 0 if found is None else found.version_number or 0

    def variation_files(self, name: str, version: int) -> dict[str, int]:
        """Bytes of every file of a version, by name."""
        doing, found = f"model {name}: its files", {}

        def ask(token: str) -> Any:
            request = _of_models(
                "ApiListModelInstanceVersionFilesRequest",
                **_place(name),
                version_number=version,
                page_size=200,
                page_token=token,
            )
            return self._models(doing, "list_model_instance_version_files", request)

        for page in self.pages(doing, ask):
            found |= {it.name: it.size for it in page.files or []}
        return found

    def variation_file(self, name: str, version: int, path: str) -> bytes | None:
        """The content of a small file of a version; None when it has none."""
        request = _of_models(
            "ApiDownloadModelInstanceVersionRequest",
            **_place(name),
            version_number=version,
            path=path,
        )
        method = "download_model_instance_version"
        doing = f"model {name}: {path}"
        how = {"read": self.receive_small, "absent": (403, 404)}
        return self._models(doing, method, request, **how)

    def create_variation(
        self, name: str, folder: Path, metadata: Mapping[str, Any]
    ) -> None:
        """A model's new variation from the files of a folder; all of them, or an error."""
        place = _place(name)
        with uploads.uploaded(self, f"model {name}", folder, "MODEL") as sent:
            body = _of_models(
                "ApiCreateModelInstanceRequestBody",
                instance_slug=place.pop("instance_slug"),
                framework=place.pop("framework"),
                overview=metadata["overview"],
                usage=metadata["usage"],
                license_name=metadata["licenseName"],
                fine_tunable=metadata["fineTunable"],
                training_data=metadata["trainingData"],
                files=sent,
            )
            request = _of_models("ApiCreateModelInstanceRequest", **place, body=body)
            answer = self._models(
                f"model {name}: create",
                "create_model_instance",
                request,
                arrived=lambda: self.variation(name) or None,
            )
            self.made(answer, f"model {name}")

    def create_variation_version(self, name: str, folder: Path, before: int) -> None:
        """The version after `before`; its files replace all others."""
        with uploads.uploaded(self, f"model {name}", folder, "MODEL") as sent:
            body = _of_models(
                "ApiCreateModelInstanceVersionRequestBody",
                version_notes=NOTES,
                files=sent,
            )
            kind = "ApiCreateModelInstanceVersionRequest"
            request = _of_models(kind, **_place(name), body=body)
            answer = self._models(
                f"model {name}: new version",
                "create_model_instance_version",
                request,
                arrived=lambda: self.variation(name) > before or None,
            )
            self.made(answer, f"model {name}")

    def _models(self, doing: str, method: str, request: Any, **how: Any) -> Any:
        return self.call(doing, f"models.model_api_client.{method}", request, **how)


def _of_models(kind: str, **fields: Any) -> Any:
    """A message of the client's model service."""
    from kagglesdk.models.types import model_api_service

    return filled(getattr(model_api_service, kind)(), **fields)


def _place(name: str) -> dict[str, Any]:
    """A variation's name as the fields of a request."""
    from kagglesdk.models.types.model_enums import ModelFramework

    owner, model, framework, variation = name.split("/")
    if framework != "pyTorch":
        raise ValueError(f"model {name}: framework {framework} is not pyTorch")
    return {
        "owner_slug": owner,
        "model_slug": model,
        "framework": ModelFramework.MODEL_FRAMEWORK_PY_TORCH,
        "instance_slug": variation,
    }
