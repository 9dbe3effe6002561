"""The served model's weights as GGUF files of other types, so that a peer runs the very same numbers.

    python -m benchmarks.peers.gguf_weights DIRECTORY F16 BF16 Q8_0

writes DIRECTORY/smollm2-F16.gguf and so on where they are missing; its last line is the directory that holds the same
model as safetensors.
"""

import sys
from pathlib import Path

import gguf
import numpy as np

from engine.checkpoints.gguf import convert, default_model


def write(source: Path, target: Path, kind: str) -> None:
    """Every matrix of `source` in type `kind`, vectors as they are, all metadata but the file's type copied."""
    reader = gguf.GGUFReader(source)
    quantisation = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(target, arch=reader.fields["general.architecture"].contents())
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        wide = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if wide.ndim == 1:
            writer.add_tensor(tensor.name, wide)
        else:
            writer.add_tensor(tensor.name, gguf.quantize(wide, quantisation), raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    target, *kinds = sys.argv[1:]
    cache = Path.home() / ".cache" / "keypast"
    source = default_model(cache, lambda message: None)
    for kind in kinds:
        path = Path(target) / f"smollm2-{kind}.gguf"
        if not path.exists():
            write(source, path, kind)
    print(convert(source, cache))


if __name__ == "__main__":
    main()
