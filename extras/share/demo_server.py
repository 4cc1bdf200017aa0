"""
Who may reach the page, and what the server may do: its address, its password, streamlit's options, and that this
process asks no other machine for anything.
"""

import hmac
import ipaddress
import socket
import sys
import threading
import time

from plumbing.flags import UserError

MEGABYTES = 20  # of an upload, at most
SLOW = 1.0  # seconds that a wrong password costs, and all who try one at that time
ADMITTED = set()  # ids of the sessions whose visitor has typed the password


# ----------------------------------------------------------------------------- who may reach it

def is_loopback(address):
    """Whether an IP address or a name is this machine's own, which no other one reaches."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:  # another name
        return False


def require_address(config):
    """Raise UserError unless the page can be at this address and port. A name is not looked up."""
    family = socket.AF_INET6 if ":" in config.address else socket.AF_INET
    try:
        if config.address != "localhost":
            ipaddress.ip_address(config.address)
        socket.create_server((config.address, config.port), family=family).close()
    except (OSError, OverflowError, ValueError) as error:
        raise UserError(f"--address={config.address} --port={config.port}: {error}; choose an IP address of "
                        "this machine and a free port from 1 to 65535") from None


def require_password(config):
    """Raise UserError where others reach the page, and there is no password."""
    if config.password_file:
        read_password(config.password_file)
    elif not is_loopback(config.address) or config.public_name:
        where = f"--public_name={config.public_name}" if config.public_name else f"--address={config.address}"
        raise UserError(f"{where}: others reach the page there; write a password into a file, one line, and name it "
                        "with --password_file")


def read_password(path):
    """The password, bytes, that a file's one line is. Raises UserError where it holds anything else."""
    try:
        with open(path, "rb") as file:
            lines = file.read(4096).splitlines()
    except OSError as error:
        raise UserError(f"--password_file={path}: {error.strerror}; write the password into it, one line") from None
    if len(lines) != 1 or not lines[0].strip():
        raise UserError(f"--password_file={path}: not one line; write the password into it, and nothing else")
    return lines[0]


class Gate:
    """
    Lets in who knows the password. A wrong one takes SLOW seconds, in which no other is tried, whoever tries: so many
    a second are all that can be guessed. None is kept or printed.
    """

    def __init__(self, path):
        self.password, self.trying = read_password(path), threading.Lock()

    def admits(self, typed):
        with self.trying:
            right = hmac.compare_digest(typed.encode(), self.password)
            if not right:
                time.sleep(SLOW)
        return right


def take_files_of_admitted():
    """
    Let streamlit take files of ADMITTED sessions alone, before it reads them. It would take them of every page that is
    open, whatever that shows: of a session it asks there, and nowhere else, but whether it is active.
    """
    from streamlit.runtime import Runtime
    active = Runtime.is_active_session
    Runtime.is_active_session = lambda runtime, session: session in ADMITTED and active(runtime, session)


# ----------------------------------------------------------------------------- what it may do

def server_settings(config):
    """Streamlit's options without which the page would not be private."""
    # Elsewhere a site could give its own name this machine's address, and read the page in a browser here
    hosts = ["localhost", "127.0.0.1", "::1"] if is_loopback(config.address) else []
    return {"server.address": config.address, "server.maxUploadSize": MEGABYTES,
            "server.allowedHosts": hosts + [config.public_name] * bool(hosts and config.public_name),
            "server.baseUrlPath": config.base_path.strip("/"), "browser.gatherUsageStats": False,
            "client.showErrorDetails": "none", "logger.hideWelcomeMessage": True}


def stay_here(address):
    """
    Let this process open no connection to another machine, nor ask for one's address. Streamlit would
    ask a host on the internet for this machine's own address, to print it when it listens on all, and
    to compare it with where a page says that it comes from.
    """
    def refuse(event, arguments):
        if event == "socket.getaddrinfo":
            host = arguments[0].decode() if isinstance(arguments[0], bytes) else arguments[0]
        elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            host = arguments[1][0] if isinstance(arguments[1], tuple) else None  # None: within the machine
        elif event in ("socket.gethostbyname", "socket.gethostbyaddr"):
            host = arguments[0]
        else:
            return
        if host not in (None, "", address) and not is_loopback(host):
            raise PermissionError(f"{event} of {host}: the demo asks no other machine")

    from streamlit import net_util
    net_util.get_internal_ip = net_util.get_external_ip = lambda: None  # else it logs each refusal
    sys.addaudithook(refuse)
