"""`icm serve`: an OpenAI-compatible server in front of one engine, which writes and loads the tasks asked for.

    client --> app        token, limits, allow-list of routes
                |
                v
               forward    the body's "model" -> catalogue (is it a task?) -> residency (is it loaded?) -> engine
                |             bytes pass through as they come, in both directions
                v
               engines    the few requests that icm itself makes: list, load, unload

One event loop serves everything. What takes time (reading the store, decoding, comparing base models) is done in
threads. `server` runs it; the package needs the extra `icm-lora[serve]`.
"""
