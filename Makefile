# Everything in .venv, from pinned requirements. Python 3.11 or newer; make PYTHON=python3.12 test
PYTHON ?= python3
# glibc keeps freed memory with these two: a training step on a CPU takes a tenth less
RUN = MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=2147483647 .venv/bin/python
.PHONY: demo test clean release autograder course-check
.DELETE_ON_ERROR:

demo: .venv/ready
	@echo "1 of 8: Python's own documentation becomes tokens (15 seconds)"
	@test -f data/pydoc/meta.json || $(RUN) data/prepare.py
	@echo "2 of 8: a model with prototypes trains on it (1 to 5 minutes)"
	@$(RUN) train.py --resume --max_iters=450
	@echo "3 of 8: it continues a text (seconds)"
	@$(RUN) sample.py --prompt="Return the number of" --num_samples=2 --max_new_tokens=60
	@echo "4 of 8: the index of all training text (1 to 3 minutes)"
	@$(RUN) attribute.py index
	@echo "5 of 8: which training text makes ' bytes' more likely there, and which less? (seconds)"
	@$(RUN) attribute.py query --prompt="Return the number of" --target=" bytes" --top=3
	@echo "6 of 8: which prototypes detect '>>>', and what if a direction acts on it? (1 minute)"
	@$(RUN) suppress.py find --behavior='>>>' --name=examples --size=64 --tokens=60000
	@$(RUN) suppress.py apply --gains=out/gains/examples.json --prompt=">>> import"
	@echo "7 of 8: all of it on one page (40 seconds)"
	@$(RUN) report.py --prompt="Return the number of"
	@echo "8 of 8: the sum behind each token, with the names of its prototypes (seconds)"
	@$(RUN) sample.py --prompt="Return the number of" --explain
	@echo "Done. Open out/report.html in a browser. To go on: . .venv/bin/activate"

test: .venv/ready
	$(RUN) -m pytest -q tests

release autograder: .venv/ready  # make release A=a1 YEAR=2027; see course/README.md
	$(RUN) course/course.py $@ $(A) --year=$(or $(YEAR),0)

course-check: .venv/ready
	$(RUN) tests/prove_course.py

.venv/ready: requirements.txt
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('Python 3.11 or newer is needed')"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch .venv/ready

clean:
	rm -rf .venv out
