"""A server on the loopback that speaks as much of the Hugging Face Hub's download protocol as its client asks for."""
import hashlib
import shutil
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = '0123456789abcdef0123456789abcdef01234567'


@cache
def _etag(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        path = self._answer()
        if path is not None:
            with path.open('rb') as f:
                shutil.copyfileobj(f, self.wfile)

    def _answer(self):
        """Send the head of an answer to /ORG/NAME/resolve/REVISION/FILE; the path of the file where there is one."""
        parts = self.path.split('?')[0].strip('/').split('/')
        path = self.server.folder.joinpath(*parts[:2], *parts[4:])
        found = len(parts) > 4 and parts[2] == 'resolve' and path.is_file()
        self.server.requests.append((self.command, self.path))
        self.send_response(200 if found else 404)
        if found:
            self.send_header('ETag', f'"{_etag(path)}"')
            self.send_header('X-Repo-Commit', COMMIT)
        else:
            self.send_header('X-Error-Code', 'EntryNotFound')
        self.send_header('Content-Length', str(path.stat().st_size if found else 0))
        self.end_headers()
        return path if found else None

    def log_message(self, *args):
        pass


@contextmanager
def hub_server(folder):
    """Serve the files folder/ORG/NAME/FILE; gives the server, with its address `url` and its `requests`."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), _Handler)
    server.folder, server.requests = Path(folder), []
    server.url = f'http://127.0.0.1:{server.server_port}'
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
