"""The server as replicas on Ray Serve: a gateway that speaks HTTP, before engines that Ray places, starts again and scales.

    serve run llama_fast.serve.ray:app model=smollm2-135m replicas=2

Which replica gets a request, how many there are, and where, is Ray's to decide. What Ray leaves to an application is here: a
request whose replica is lost before anything was sent is asked again, and one whose client leaves is cancelled.
"""

from llama_fast.serve.ray.application import app

__all__ = ["app"]
