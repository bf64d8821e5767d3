# Stands in for NVIDIA's PyTorch image, which is too large to fetch for a test: it brings a torch and a numpy of its own
# and constraints on other packages, in the places where NVIDIA's image has them.
ARG BASE_IMAGE=localhost/megatron_crnet_base
FROM ${BASE_IMAGE}
ARG PIP_BREAK_SYSTEM_PACKAGES=1 PIP_CONFIG_FILE=/run/secrets/pip.conf
COPY requirements-torch.txt /tmp/
RUN --mount=type=secret,id=pip.conf grep '^torch==' /tmp/requirements-torch.txt >/tmp/torch.txt \
    && python3 -m pip install --no-cache-dir --requirement /tmp/torch.txt numpy==2.3.5 PyYAML==6.0.2 \
    && rm /tmp/torch.txt /tmp/requirements-torch.txt \
    && mkdir -p /etc/pip \
    && printf 'numpy==2.3.5\nPyYAML==6.0.2\n' >/etc/pip/constraint.txt
ENV PIP_CONSTRAINT=/etc/pip/constraint.txt
