# Everything in .venv, from pinned requirements. Needs Python 3.11 or newer; PYTHON=python3.12 make test chooses one.
PYTHON ?= python3
.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: .venv/ready
	test -f data/pydoc/meta.json || .venv/bin/python data/prepare.py pydoc
	.venv/bin/python train.py --resume
	.venv/bin/python prism.py --prompt="Return the number of" --num_samples=2 --max_new_tokens=60
	.venv/bin/python attribute.py index
	.venv/bin/python attribute.py query --prompt="Return the number of" --target=" bytes" --top=3
	.venv/bin/python attribute.py report --prompt="Return the number of"
	.venv/bin/python suppress.py find --behavior='>>>' --name=examples --mode=fit --tokens=60000
	.venv/bin/python suppress.py apply --gains=out/gains/examples.json --prompt=">>> import" --num_samples=3

test: .venv/ready
	.venv/bin/python -m pytest -q tests

.venv/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'error: Python 3.11 or newer is needed, found ' + sys.version.split()[0] + '; try: make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar on -r requirements.txt
	touch .venv/ready

clean:
	rm -rf .venv out
