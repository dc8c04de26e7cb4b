"""Emulated Google storage: a local server that speaks its HTTP API."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus

# gcsfs asks for the kind of a bucket by gRPC, for 60 s, which the emulator does not speak.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"

import gcsfs
import pytest
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import HANDLERS, create_server


@contextmanager
def emulated_bucket(name: str, port: int) -> Iterator[str]:
    """The address of an empty bucket, for this process and those that it starts."""
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=name)
    with pytest.MonkeyPatch.context() as patch:
        for _, methods in HANDLERS:
            for method, handler in methods.items():
                if handler in (objects.get, objects.download, objects.insert):
                    patch.setitem(methods, method, _conditional(_versioned(handler)))
                if handler is objects.delete:
                    patch.setitem(methods, method, _conditional(handler))
        patch.delattr(gcsfs.core.GCSFileSystem, "_mv_file")  # no moveTo there: copy, then delete
        for client in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
            patch.setenv(client, f"http://127.0.0.1:{port}")
        server.start()
        yield f"gs://{name}"
        server.stop()


def _versioned(handler: Callable) -> Callable:
    """A handler whose answers name the object's version, as Google's do: TensorStore reads it."""

    def handle(request, response, storage) -> None:
        handler(request, response, storage)
        file = request.params.get("object_id") or request.query.get("name", [""])[0]
        with suppress(NotFound):  # a resumable upload has only begun
            found = storage.get_file_obj(request.params["bucket_name"], file)
            response["x-goog-generation"] = found["generation"]

    return handle


def _conditional(handler: Callable) -> Callable:
    """A handler that refuses to replace another generation than the one that is expected."""

    def handle(request, response, storage) -> None:
        if expected := request.query.get("ifGenerationMatch"):
            file = request.params.get("object_id") or request.query.get("name", [""])[0]
            try:
                found = storage.get_file_obj(request.params["bucket_name"], file)["generation"]
            except NotFound:
                found = "0"
            if found != expected[0]:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        handler(request, response, storage)

    return handle
