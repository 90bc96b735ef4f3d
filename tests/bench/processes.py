"""The processes of a cluster that a benchmark starts and stops, each with a log of its own."""

import os
import random
import signal
import socket
import subprocess
import sys


class Processes:
    """What was started, the bus first. `logs` is a folder."""

    def __init__(self, logs):
        self.logs = logs
        self.all = []

    def start(self, name, command, **environment):
        log = open(self.logs / f"{name}.log", "w")
        process = subprocess.Popen([str(part) for part in command], stdout=log, stderr=log, env={**os.environ, **environment})
        self.all.append((name, process))

    def check_alive(self):
        """Ends the benchmark if one of them has ended."""
        for name, process in self.all:
            if process.poll() is not None:
                sys.exit(f"{name} ended:\n" + "\n".join((self.logs / f"{name}.log").read_text().splitlines()[-15:]))

    def stop(self, seconds=10):
        """Ends them, the bus last; who takes longer than so many seconds is killed."""
        for those in (self.all[1:], self.all[:1]):
            for _, process in those:
                process.send_signal(signal.SIGTERM)
            for _, process in those:
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    process.kill()


def free_port():
    """One that nobody listens on, below those that Linux gives by chance: it is still free when a process is told of it."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as asks:
            if asks.connect_ex(("127.0.0.1", port)) != 0:
                return port
