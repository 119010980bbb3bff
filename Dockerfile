# hf-mim for machines with NVIDIA GPUs:
#     docker build -t hf-mim .
#     docker run --gpus all --ipc host -v $PWD/data:/data -v $PWD/runs:/runs hf-mim \
#         hf-mim pretrain --dataset /data --output_dir /runs/mine
FROM python:3.13-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
RUN useradd --create-home --uid 1000 user
WORKDIR /hf_mim
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
# torch has the largest files, so it is a layer of its own, which a change of our code leaves as it is.
RUN pip install torch==2.13.0
COPY hf_mim hf_mim
COPY training training
RUN pip install --constraint constraints.txt ".[tiff,dicom,heif,logs]"
USER 1000
CMD ["hf-mim", "--help"]
