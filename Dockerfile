# keypast as a container: no compiler in it, no root, nothing in it needs to be written to.
#
#   docker build -t keypast .                          the CPU, SmolLM2-135M inside
#   docker build -t keypast:cuda --build-arg DEVICE=cuda .
#   docker build -t keypast --build-arg MODEL=none .   no model: mount one, and say KEYPAST_MODELS (docs/operations.md)
#   docker build -t keypast:loadtest --target loadtest .   `keypast loadtest` alone, which needs no torch

FROM docker.io/library/python:3.11-slim-bookworm AS builder
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/keypast/venv
ENV PATH=/opt/keypast/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src

# torch by itself, since it is large and seldom another. The default index has the one that brings CUDA; an empty
# TORCH_INDEX takes that index for the CPU, too.
ARG DEVICE=cpu
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN index="$TORCH_INDEX"; if [ "$DEVICE" = cuda ]; then index=; fi; \
    pip install --no-deps ${index:+--index-url "$index"} "$TORCH"

# Then what keypast needs, as it was tested; the kernels by themselves; and only then keypast, so that a change of it
# neither installs nor compiles anything else.
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    extras = p['optional-dependencies']; \
    print(*p['dependencies'], *extras['server'], *extras['otel'], sep='\n')" > requirements.txt \
    && pip install -c constraints.txt -r requirements.txt
COPY engine/__init__.py engine/
COPY engine/kernels engine/kernels
RUN python -m engine.kernels.build --cache /opt/keypast/cache
COPY README.md LICENSE ./
COPY keypast keypast
COPY engine engine
COPY service service
RUN pip install --no-deps .

WORKDIR /

# The default model, converted; the download is not kept.
ARG MODEL=default
RUN mkdir -p /opt/keypast/models && if [ "$MODEL" = default ]; then \
    python -c "import pathlib, shutil, tempfile; from engine.checkpoints import gguf; \
    cache = pathlib.Path(tempfile.mkdtemp()); \
    shutil.move(gguf.convert(gguf.default_model(cache, print), cache, print), '/opt/keypast/models/smollm2-135m')"; fi \
    && rm -rf /tmp/* && chmod -R a+rX /opt/keypast


FROM docker.io/library/python:3.11-slim-bookworm AS tester
RUN python -m venv /opt/keypast/venv
ENV PATH=/opt/keypast/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY keypast keypast
COPY engine engine
COPY service service
RUN pip install -c constraints.txt '.[loadtest]'


FROM docker.io/library/python:3.11-slim-bookworm AS loadtest
COPY --from=tester /opt/keypast /opt/keypast
ENV PATH=/opt/keypast/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /tmp
USER 10001:10001
ENTRYPOINT ["keypast", "loadtest"]


FROM docker.io/library/python:3.11-slim-bookworm
LABEL org.opencontainers.image.title=keypast org.opencontainers.image.licenses=Apache-2.0

# On a GPU Triton makes a small C program of each kernel at its first use: there, and only there, a compiler stays.
ARG DEVICE=cpu
RUN if [ "$DEVICE" = cuda ]; then apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*; fi
RUN groupadd --gid 10001 keypast \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin keypast
COPY --from=builder /opt/keypast /opt/keypast

ENV PATH=/opt/keypast/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    KEYPAST_HOST=0.0.0.0 \
    KEYPAST_PORT=8000 \
    KEYPAST_CACHE_DIR=/opt/keypast/cache \
    KEYPAST_MODELS="smollm2-135m=/opt/keypast/models/smollm2-135m attention=attention:hidden=512,heads=8"
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 CMD ["python", "-m", "service.healthcheck"]
ENTRYPOINT ["keypast"]
CMD ["serve"]
