"""Rows that leave the disk of a shard, kept at any fsspec URL (s3://, gs://, file://, ...).

    <url>/<run_id>/<buffer>/<shard>/segment-000003.arrows  the rows that left with segment 3; the format of a segment

A row is written there when the file that holds it is about to go, so each one stands there once: rows that stay move on
to another file, with which they leave one day. An upload that is repeated writes the same name again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import fsspec
import pyarrow as pa

from buffer.run_identity import run_id
from buffer.store.catalog import segment_path


class ArchiveError(OSError):
    """The archive did not take a file; nothing was deleted."""


class Archive:
    """The archive of one shard. Its methods may run in any thread."""

    def __init__(self, url: str, folder: Path) -> None:
        """folder: of the shard, in that of the buffer, in that of the run.

        Raises:
            ValueError: no file system goes by the URL's protocol, or the package for it is missing.
        """
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"buffer.archive={url}: {error}") from None
        buffer, shard = folder.resolve().parts[-2:]
        self._folder = "/".join([root.rstrip("/"), run_id(folder.resolve().parents[1]), buffer, shard])

    def write(self, number: int, batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> None:
        """Keep rows that leave with segment `number`.

        Raises:
            ArchiveError: it could not be done.
        """
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            for batch in batches:
                writer.write_batch(batch)
        target = f"{self._folder}/{segment_path(Path(), number).name}"
        try:
            self._files.makedirs(self._folder, exist_ok=True)
            # Object storage shows a file when it is complete; a folder does as soon as the file has its name.
            in_folder = "file" in self._files.protocol
            written = f"{target}.tmp" if in_folder else target
            self._files.pipe_file(written, sink.getvalue().to_pybytes())
            if in_folder:
                self._files.mv(written, target)
        except Exception as error:  # each file system raises the errors of its own client library
            raise ArchiveError(f"the archive did not take {target}: {type(error).__name__}: {error}") from error
