"""A stand-in for `sys.executable` where sslvit lets timm load what it has written: a program that has it run in a new
process, forked from one that has imported timm, and not sslvit. A new interpreter takes four seconds to import it."""

import os
import subprocess
import sys
import tempfile
from functools import cached_property
from pathlib import Path

SERVER = """
import importlib, json, os, select, socket, sys, traceback
import numpy, safetensors.torch, timm, torch
for name in sys.argv[2:]:
    importlib.import_module(name)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
while listener in select.select([listener, sys.stdin], [], [])[0]:  # until the tests have ended
    connection, _ = listener.accept()
    request, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 2)
    pid = os.fork()
    if pid == 0:
        folder, program, arguments = json.loads(request)
        for number, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, number)
        os.chdir(folder)
        sys.argv, status = ["-c", *arguments], 0
        try:
            exec(program, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(bytes([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255]))
    connection.close()
"""
CLIENT = """#!{python} -SE
import json, os, socket, sys
assert sys.argv[1] == "-c"
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
socket.send_fds(connection, [json.dumps([os.getcwd(), sys.argv[2], sys.argv[3:]]).encode()], [1, 2])
sys.exit(connection.recv(1)[0])
"""


class Interpreter:
    """Has the one name of `sys` that sslvit/checkpoints/exported.py reads. Nothing starts before it is asked for."""

    def __init__(self, *modules: str) -> None:
        """modules: what its programs find imported, beside timm."""
        self.modules = modules

    @cached_property
    def executable(self) -> str:
        self.folder = tempfile.TemporaryDirectory()  # a short path, as that of a socket has to be
        address, client = str(Path(self.folder.name) / "socket"), Path(self.folder.name) / "python"
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER, address, *self.modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=self.folder.name,
        )  # fmt: skip
        assert self.server.stdout.readline() == b"ready\n"
        client.write_text(CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        return str(client)

    def close(self) -> None:
        if "executable" in vars(self):
            self.server.kill()
            self.server.communicate()
            self.folder.cleanup()
