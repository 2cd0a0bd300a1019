# Everything in .venv, from pinned requirements. Python 3.11 or newer; make PYTHON=python3.12 test
PYTHON ?= python3
RUN = .venv/bin/python
.PHONY: demo test clean
.DELETE_ON_ERROR:

demo: .venv/ready
	test -f data/pydoc/meta.json || $(RUN) data/prepare.py
	$(RUN) train.py --resume
	$(RUN) sample.py --prompt="Return the number of" --num_samples=2 --max_new_tokens=60
	$(RUN) attribute.py index
	$(RUN) attribute.py query --prompt="Return the number of" --target=" bytes" --top=3
	$(RUN) suppress.py find --behavior='>>>' --name=examples --mode=fit --tokens=60000
	$(RUN) suppress.py apply --gains=out/gains/examples.json --prompt=">>> import"
	$(RUN) report.py --prompt="Return the number of"

test: .venv/ready
	$(RUN) -m pytest -q tests

.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed')"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready

clean:
	rm -rf .venv out
