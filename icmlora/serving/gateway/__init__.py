"""`icm serve`: an OpenAI-compatible server in front of one engine, which writes and loads the requested tasks.

    client --> app        token, limits, allow-list of routes
                |
                v
               forward    the body's "model" -> catalogue (is it a task?) -> residency (is it loaded?) -> engine
                |             streams the response unchanged
                v
               engines    icm's own few requests: list, load, unload

One event loop serves all connections. Slow work (reading the store, decoding, comparing base models) runs in threads.
`server` runs it; the package needs the extra `icm-lora[serve]`.
"""
