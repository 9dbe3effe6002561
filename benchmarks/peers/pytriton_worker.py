"""A Triton server that sends back what came, run by an interpreter that has PyTriton: `pytriton_worker.py PORT`.

One model, `echo`: x, FP16 of any length, comes back as y. Batches form as PyTriton's documentation has it by default:
of what waits, without waiting for more. Ends with SIGTERM, Triton's own processes too.
"""

import sys
from typing import Any

import numpy as np
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

MOST = 64  # requests a batch


@batch  # type: ignore[untyped-decorator]
def echo(x: Any) -> dict[str, Any]:
    return {"y": x}


def main() -> None:
    settings = TritonConfig(http_address="127.0.0.1", http_port=int(sys.argv[1]), allow_grpc=False, allow_metrics=False)
    with Triton(config=settings) as triton:
        triton.bind(
            model_name="echo",
            infer_func=echo,
            inputs=[Tensor(name="x", dtype=np.float16, shape=(-1,))],
            outputs=[Tensor(name="y", dtype=np.float16, shape=(-1,))],
            config=ModelConfig(max_batch_size=MOST),
        )
        triton.serve()


main()
