# docker build -t spatialscore .                        the CPU
# docker build -t spatialscore --build-arg CUDA=1 .     NVIDIA GPUs too (the host needs a driver for CUDA 13)
FROM rust:1.95-bookworm AS build
ARG CUDA
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv make g++ nasm && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY Makefile ./
COPY scripts scripts
RUN make libtorch ${CUDA:+cuda}
COPY . .
RUN make build && strip target/release/spatialscore

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates libstdc++6 \
    && rm -rf /var/lib/apt/lists/* && useradd --system --create-home --uid 10001 spatialscore
# Libraries only: the headers stay behind.
COPY --from=build /src/.libtorch/site/torch/lib /opt/libtorch/torch/lib
COPY --from=build /src/.libtorch/site/nvidia /opt/libtorch/nvidia
COPY --from=build /src/target/release/spatialscore /usr/local/bin/spatialscore
# With GOMP_SPINCOUNT set, the server does not start itself anew to set it.
ENV LD_LIBRARY_PATH=/opt/libtorch/torch/lib \
    GOMP_SPINCOUNT=10000 \
    HF_HOME=/var/cache/huggingface \
    SPATIALSCORE__SERVER__LISTEN=0.0.0.0:50051 \
    SPATIALSCORE__METRICS__LISTEN=0.0.0.0:9464
RUN install -d -o spatialscore /var/cache/huggingface
USER spatialscore
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
# A container is reached by what its operator publishes, and by nobody else: --allow-anonymous says that this was
# thought of. With SPATIALSCORE__AUTH__TOKENS_FILE set, callers must show a token all the same.
# `env` holds a signal that comes while the libraries are loaded: the system drops what a first process has no handler for.
ENTRYPOINT ["env", "--block-signal=TERM,INT,HUP", "spatialscore"]
CMD ["serve", "--allow-anonymous"]
