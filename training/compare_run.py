"""Runs jobs, several at a time, each in a process with one thread. As a script, this file is such a process."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compare_jobs import Job
from compare_plan import file_name

from hf_mim.cli import main
from hf_mim.pretraining.signals import Listener
from hf_mim.scrub import scrubbed

LOOK = 0.2  # seconds from one look at the processes to the next
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}  # one thread each, and no progress bars in the logs


@dataclass
class Launcher:
    """Starts the processes of jobs.

    modules: what they import first. logs: the folder for what they print.
    """

    modules: Sequence[str]
    logs: Path

    def log(self, job: Job) -> Path:
        return self.logs / f"{file_name(job.name)}.log"

    def commands(self, job: Job) -> list[list[str]]:
        """What is left of a job, as arguments of `hf-mim`. A run that has begun goes on."""
        imports = [word for module in self.modules for word in ("--import", module)]
        return [imports + step.arguments + ["--resume"] * step.is_begun for step in job.left]

    def start(self, job: Job) -> subprocess.Popen:
        self.logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-u", __file__, json.dumps(self.commands(job))]
        with open(self.log(job), "w") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT)

    def reason(self, job: Job, status: int) -> str:
        """Why its process has failed, in one line: the last error that it has printed, or its last line."""
        if status < 0:
            return f"ended by {signal.Signals(-status).name}"
        lines = [line.strip() for line in re.split(r"[\r\n]+", self.log(job).read_text(errors="replace"))]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return scrubbed((errors or list(filter(None, lines)) or [f"exit status {status}"])[-1])


def run_jobs(jobs: Sequence[Job], at_once: int, launcher: Launcher, ended: Callable[[], None]) -> signal.Signals | None:
    """Run all jobs that are not done. One that fails does not stop the others.

    SIGTERM, SIGHUP and SIGINT reach the processes as SIGTERM, after which a training saves a checkpoint.

    Args:
        at_once: the most processes at the same time.
        ended: called when a job has ended, well or not.

    Returns:
        The signal that has ended it, if one has.
    """
    waiting, running, told = [job for job in jobs if job.left], {}, set()
    listener = Listener(math.inf)
    try:
        with listener.listening():
            while True:
                for job in [job for job, process in running.items() if process.poll() is not None]:
                    status = running.pop(job).returncode
                    if job.left and not listener.asked:
                        job.failure = f"{job.left[0].measures}: {launcher.reason(job, status)}"
                    print(f"{job.name}: {job.failure or ('ended' if job.left else 'done')}", flush=True)
                    ended()
                while not listener.asked and len(running) < at_once and (job := next(filter(may_begin, waiting), None)):
                    print(f"{job.name}: begins", flush=True)
                    waiting.remove(job)
                    running[job] = launcher.start(job)
                if not running:
                    break
                for job in running.keys() - told if listener.asked else ():
                    running[job].terminate()
                    told.add(job)
                time.sleep(LOOK)
    finally:
        for process in running.values():  # after an error of ours, or a second ^C
            process.kill()
    for job in waiting if not listener.asked else ():
        job.failure = f"{job.left[0].measures}: there is no checkpoint of {job.needs.name}"
    return listener.asked


def may_begin(job: Job) -> bool:
    return job.needs is None or job.needs.steps[0].is_done


def work(commands: list[list[str]]) -> int:
    """Do commands of hf-mim one after another, up to the first that fails, and return its exit status."""
    for command in commands:
        print(f"hf-mim {' '.join(command)}")
        if status := main(command):
            return status
    return 0


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.argv[1])))
