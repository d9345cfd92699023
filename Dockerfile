# A server image of Gloam. The steps are the project's own scripts, so that what is tested outside
# a container is what runs here.
#
#   docker build --target cpu -t gloam:cpu .
#   docker build --target cuda --build-arg BUILD_IMAGE=nvidia/cuda:13.0.2-devel-ubuntu24.04 \
#     -t gloam:cuda .
#   docker run -p 8000:8000 -v gloam-models:/models gloam:cpu
#
# The model is looked up in, or fetched into, the volume at /models.
ARG BUILD_IMAGE=debian:12-slim

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
COPY deploy deploy
RUN deploy/install-deps
COPY . .
RUN deploy/quickstart --build-only && cmake --install build/release --prefix /opt/gloam

# What runs: the installed folder, a user without rights, and a health check by the program itself.
FROM debian:12-slim AS cpu
COPY deploy/container-setup /tmp/container-setup
RUN /tmp/container-setup
COPY --from=build /opt/gloam /opt/gloam
ENV PATH=/opt/gloam/bin:$PATH GLOAM_MODELS=/models GLOAM_HOST=0.0.0.0
USER gloam
VOLUME /models
EXPOSE 8000 50051
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["gloam", "health"]
ENTRYPOINT ["gloam"]
CMD ["serve", "smollm2-135m-instruct"]

FROM nvidia/cuda:13.0.2-base-ubuntu24.04 AS cuda
COPY deploy/container-setup /tmp/container-setup
RUN /tmp/container-setup
COPY --from=build /opt/gloam /opt/gloam
ENV PATH=/opt/gloam/bin:$PATH GLOAM_MODELS=/models GLOAM_HOST=0.0.0.0
USER gloam
VOLUME /models
EXPOSE 8000 50051
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD ["gloam", "health"]
ENTRYPOINT ["gloam"]
CMD ["serve", "smollm2-135m-instruct"]
