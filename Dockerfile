# An image with the page and the API (docs/container.md). By itself it has PyTorch's usual build, for NVIDIA's cards;
# --build-arg TORCH_INDEX=ADDRESS takes another one, such as that for the CPU, which makes a far smaller image.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS packages
ARG TORCH_INDEX=""
WORKDIR /app
ENV PATH="/venv/bin:$PATH" PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN python -m venv /venv
COPY requirements.txt ./
# The project itself follows below, so that a change in it fetches no packages anew.
RUN grep -v "^-e" requirements.txt > packages.txt \
    && if [ -n "$TORCH_INDEX" ]; then grep "^torch" packages.txt | xargs pip install --index-url "$TORCH_INDEX"; fi \
    && pip install -r packages.txt
COPY . .
RUN pip install --editable ".[app]"

FROM python:${PYTHON}-slim
# A C compiler, with which Triton builds what starts the kernels of a GPU.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home ultrapixel \
    && install --directory --owner ultrapixel /outputs
COPY --from=packages /venv /venv
COPY --from=packages /app /app
COPY models/tiny /models/tiny
WORKDIR /app
# The last two are what NVIDIA's container toolkit goes by.
ENV PATH="/venv/bin:$PATH" PYTHONUNBUFFERED=1 NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
VOLUME ["/models", "/outputs"]
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as To; to = To('127.0.0.1', 7860, timeout=5); to.request('GET', '/health'); raise SystemExit(to.getresponse().status != 200)"]
CMD ["python", "inference/app.py", "--host", "0.0.0.0", "--models", "/models", "--output_dir", "/outputs"]
