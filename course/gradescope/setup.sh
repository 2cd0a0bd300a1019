#!/usr/bin/env bash
# Gradescope runs this once, when the image is built
set -euo pipefail
apt-get update && apt-get install -y python3 python3-venv
python3 -c 'import sys; sys.version_info >= (3, 11) or sys.exit("choose a newer base image")'
python3 -m venv /opt/venv
/opt/venv/bin/pip install --quiet -r /autograder/source/files/requirements.txt
chmod 700 /autograder/source
