"""Write models as artifacts (graph, weights, manifest), and check them."""

from l4convert.emit.fill import Filling
from l4convert.emit.manifest import adapter_digests, read_manifest, source_digests
from l4convert.emit.staging import check_destination
from l4convert.emit.verify import VerifyReport, verify_artifact
from l4convert.emit.write import write_artifact

__all__ = [
    "Filling",
    "VerifyReport",
    "adapter_digests",
    "check_destination",
    "read_manifest",
    "source_digests",
    "verify_artifact",
    "write_artifact",
]
