"""A worker without torch: counts steps, speaks the wire, and misbehaves on request.

Prints "step N" after each step. Its state is the step. Between two steps is a safe point.

    fake_worker.py --help
"""

import argparse
import json
import mmap
import os
import signal
import socket
import sys
import time
from pathlib import Path

from ckptd import wire

STEP_S = 0.002
FOREVER = 2**40


class Worker:
    def __init__(self, options):
        self.options = options
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect(os.environ[wire.ENV_SOCKET])
        facts = {"threads": os.environ.get("OMP_NUM_THREADS", "none"), "torch": "fake"}
        self.send(wire.Hello(wire.PROTOCOL, os.getpid(), 0, 1, facts))
        packet, (page, *self.kept), _, _ = socket.recv_fds(self.socket, wire.MESSAGE_BYTES_MAX, 4)
        self.welcome = wire.decode_for_worker(packet)
        self.page = wire.StatusPage(memoryview(mmap.mmap(page, wire.PAGE_BYTES)))
        self.generation = self.welcome.generation
        self.answered = 0
        self.step = 0
        if self.welcome.memory is not None:
            content = memoryview(os.pread(self.kept[2], 1 << 16, 0))
            (place,) = wire.places(wire.table_in(content, self.welcome.memory).files).values()
            self.step = json.loads(bytes(content[place]))["step"]
            self.send(wire.Restored(self.step, 0.0))
            print("from memory", self.step, flush=True)
        elif self.welcome.checkpoint is not None:
            doubts = self.welcome.checkpoint.endswith(options.doubts or "none")
            if doubts and self.welcome.attempt <= options.doubts_until:
                self.send(wire.Refused("DamagedError", "its tensors can't be read"))
                sys.exit(1)
            state = json.loads(Path(self.welcome.checkpoint, "state.json").read_text())
            self.step = state["step"]
            self.send(wire.Restored(self.step, 0.0))
        self.page.words[wire.WORD_STEP] = self.step

    def send(self, message, descriptors=()):
        socket.send_fds(self.socket, [wire.encode(message)], list(descriptors))

    def snapshot(self, asked):
        state = json.dumps({"step": self.step}).encode()
        descriptor = os.memfd_create("state")
        os.write(descriptor, state)
        self.generation += 1
        self.send_snapshot(descriptor, [wire.Extent("state.json", 0, len(state))], asked)

    def send_snapshot(self, descriptor, files, asked):
        table = wire.encode_table(wire.Table(files, []))
        if self.options.garble == self.step:
            table = table[:-3]
        end = os.fstat(descriptor).st_size
        os.pwrite(descriptor, table, end)
        place = wire.Place(end, len(table))
        self.send(wire.Snapshot(self.generation, self.step, place, asked), [descriptor])
        if self.options.scribble:
            self.scribbled = descriptor
        else:
            os.close(descriptor)

    def safe_point(self):
        word = self.page.words[wire.WORD_REQUEST]
        if word == self.answered:
            return
        self.answered = word
        if self.options.standing and self.generation > self.welcome.generation:
            self.send(wire.Standing(self.generation, word))
        else:
            self.snapshot(word)
        if wire.request_of(word) is wire.Request.LEAVE:
            self.leave()

    def leave(self):
        while True:
            packet = self.socket.recv(wire.MESSAGE_BYTES_MAX)
            if not packet:
                sys.exit(75)
            receipt = wire.decode_for_worker(packet)
            is_receipt = isinstance(receipt, wire.Durable | wire.NotDurable)
            if is_receipt and receipt.generation == self.generation:
                break
        print("receipt", type(receipt).__name__, flush=True)
        while self.options.stay:
            time.sleep(60)
        while self.options.linger and not self.options.linger.exists():
            time.sleep(STEP_S)
        self.send(wire.Bye(finished=False))
        sys.exit(75 if isinstance(receipt, wire.Durable) else 74)

    def work(self):
        first_life = self.welcome.attempt <= self.options.lives
        until = self.step + self.options.life if first_life else FOREVER
        while self.step < self.options.total:
            if self.step == until:
                if self.options.scribble:
                    os.pwrite(self.scribbled, b"#", 3)
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(self.options.pace)
            self.step += 1
            self.page.words[wire.WORD_STEP] = self.step
            print("step", self.step, flush=True)
            if self.options.noise:
                print("." * self.options.noise, flush=True)
            if self.options.held:
                self.snapshot(0)
            while self.options.deaf and self.step == self.options.deaf:
                time.sleep(60)
            while self.options.gate and self.step == 3 and not self.options.gate.exists():
                time.sleep(STEP_S)
            self.safe_point()
        if not self.options.mute:
            self.send(wire.Bye(finished=True))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--total", type=int, default=FOREVER, help="steps until it has finished")
    parser.add_argument("--pace", type=float, default=STEP_S, help="seconds a step")
    parser.add_argument("--life", type=int, default=0, help="steps until it kills itself, ...")
    parser.add_argument("--lives", type=int, default=0, help="... in so many first attempts")
    parser.add_argument("--held", action="store_true", help="send each state unasked")
    parser.add_argument("--standing", action="store_true", help="answer: the last one stands")
    parser.add_argument("--deaf", type=int, help="no safe point any more after this step")
    parser.add_argument("--gate", type=Path, help="after step 3, wait for this file")
    parser.add_argument("--stay", action="store_true", help="do not end after the receipt")
    parser.add_argument("--mute", action="store_true", help="finish without saying so")
    parser.add_argument("--refuse", help="say that starting again would not help")
    parser.add_argument("--doubts", help="say that the checkpoint of this name is damaged")
    parser.add_argument("--doubts-until", type=int, default=FOREVER, help="this attempt")
    parser.add_argument("--linger", type=Path, help="after the receipt, wait for this file")
    parser.add_argument("--garble", type=int, help="no one can read the table of this step's state")
    parser.add_argument("--noise", type=int, help="characters to print after each step")
    parser.add_argument("--scribble", action="store_true", help="into the last state, dying")
    parser.add_argument("--say", help="something for the user")
    options = parser.parse_args()
    # Signals to the worker's own process mean nothing to it: it is asked through the page.
    worker = Worker(options)
    print("attached", flush=True)
    if options.say:
        worker.send(wire.Said(options.say))
    if options.refuse:
        worker.send(wire.Refused("MismatchError", options.refuse))
        sys.exit(1)
    worker.work()


if __name__ == "__main__":
    main()
