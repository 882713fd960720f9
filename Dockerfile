# docker build -t magpo .                                   CPU
# docker build -t magpo --build-arg EXTRA=cuda12 .          NVIDIA GPU: docker run --gpus all ...
# docker run -v "$PWD/results:/magpo/results" magpo magpo.systems.mappo env=lbf/2s-8x8-2p-2f-coop budget=quick
FROM python:3.11-slim
ARG EXTRA=mabrax
WORKDIR /magpo
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY magpo magpo
COPY configs configs
RUN pip install --no-cache-dir -c constraints.txt -e ".[$EXTRA,plot,render,sweep]"
ENTRYPOINT ["python", "-m"]
