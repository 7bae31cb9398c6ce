# The kafjax command in a container, on CPU or, with EXTRAS=data,cuda, on NVIDIA GPUs:
#
#   docker build --tag kafjax:cpu .
#   docker build --tag kafjax:cuda --build-arg EXTRAS=data,cuda .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" kafjax:cpu \
#       auto --images scans --labels labels --output study
#
# The second image runs with --gpus all; the host has the driver, the image the libraries.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY setup.cfg pyproject.toml MANIFEST.in README.md LICENSE ./
COPY kafjax kafjax
COPY configs configs
COPY data_prep data_prep
RUN python -m pip wheel --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
ARG EXTRAS=data
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    python -m pip install --no-cache-dir "$(echo /wheels/kafjax-*.whl)[${EXTRAS}]"
# Any user may run it: caches of programs and fonts go here.
ENV HOME=/tmp
WORKDIR /work
ENTRYPOINT ["kafjax"]
CMD ["--help"]
