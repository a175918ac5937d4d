# Not yet verified: no image could be built where this was written.
#
#     docker build --tag metaembed-pl .
#     docker build --tag metaembed-pl:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
#     docker run --rm -v "$PWD:/work" metaembed-pl recipes
FROM python:3.12-slim

# Where torch comes from: builds for CPUs, or for a version of CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=mlflow,hub,pdf,index,qdrant,serve,remote

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=/work/.cache/huggingface
WORKDIR /src
COPY constraints.txt ./
RUN pip install --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY recipes ./recipes
COPY data_prep ./data_prep
RUN pip install --constraint constraints.txt ".[$EXTRAS]"

RUN useradd --create-home user && mkdir /work && chown user /work
USER user
WORKDIR /work
ENTRYPOINT ["metaembed-pl"]
CMD ["--help"]
