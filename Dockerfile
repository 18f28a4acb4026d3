# docker build --target cuda -t vllm-puzzle .        serve on NVIDIA GPUs, on vLLM's own image (the default)
# docker build --target cpu  -t vllm-puzzle:cpu .    serve on a CPU
#
# docker run --gpus all -v /models:/models -p 8000:8000 vllm-puzzle /models/PACKED --quantization puzzlemoe

# The wheel holds the compiled CPU engine; only this stage needs a compiler.
FROM python:3.11-slim AS wheel
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src /src/tools/vllm-cpu-shim

FROM python:3.11-slim AS cpu
# Where pip finds torch's CPU wheels, as in the Makefile: --build-arg TORCH_INDEX="--extra-index-url <index>"
ARG TORCH_INDEX=""
# vLLM compiles with g++ while it runs.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=wheel /wheels /wheels
# The same three workarounds as in the Makefile, where each is explained.
RUN pip install --no-cache-dir ${TORCH_INDEX} "torch==2.13.0+cpu" \
    && pip install --no-cache-dir ${TORCH_INDEX} "$(ls /wheels/vllm_puzzle-*.whl)[cpu]" \
    && pip uninstall --yes torchvision torchaudio torchcodec \
    && pip install --no-cache-dir --no-deps /wheels/vllm-*.whl
ENTRYPOINT ["vllm", "serve"]

FROM vllm/vllm-openai:v0.32.0 AS cuda
COPY --from=wheel /wheels /wheels
# vLLM and its torch are in the image already; pip only has to add what they lack.
RUN python3 -m pip install --no-cache-dir /wheels/vllm_puzzle-*.whl
ENTRYPOINT ["vllm", "serve"]
