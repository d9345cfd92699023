# Server images of Gloam. The steps are the project's own scripts, so that what is tested outside a
# container is what runs here.
#
#   docker build --target cpu -t gloam:cpu .
#   docker run -p 8000:8000 -v gloam-models:/models gloam:cpu
#
#   docker build --target cuda -t gloam:cuda .
#   docker run --gpus all -p 8000:8000 -v gloam-models:/models gloam:cuda
#
# The model is looked up in, or fetched into, the volume at /models.
FROM debian:12-slim AS build-cpu
WORKDIR /src
COPY deploy deploy
RUN deploy/install-deps
COPY . .
RUN deploy/quickstart --build-only --cpu && cmake --install build/release --prefix /opt/gloam

FROM debian:12-slim AS build-cuda
ARG GLOAM_CUDA_ARCHITECTURES="80;89;90a;100"
WORKDIR /src
COPY deploy deploy
RUN deploy/install-deps --cuda
COPY . .
RUN deploy/quickstart --build-only --cuda && cmake --install build/release --prefix /opt/gloam

# What runs: the installed folder, a user without rights, and a health check by the program itself.
FROM debian:12-slim AS runtime
COPY deploy/container-setup /tmp/container-setup
RUN /tmp/container-setup
ENV PATH=/opt/gloam/bin:$PATH GLOAM_MODELS=/models GLOAM_HOST=0.0.0.0
USER gloam
VOLUME /models
EXPOSE 8000 50051
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["gloam", "health"]
ENTRYPOINT ["gloam"]
CMD ["serve", "smollm2-135m-instruct"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/gloam /opt/gloam

# The CUDA runtime is in the program and cuBLASLt beside it; the driver comes from the host.
FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-cuda /opt/gloam /opt/gloam
