"""Serve adapters to inference engines. A task's adapter is written on its first request.

    request for "dog-detection"
        |
        v
    ServedTasks.find      one index lookup, so unknown names are cheap
        v
    EngineBase.problem    checks the base model and the modules
        v
    AdapterFolders.get    writes the adapter once, named by the digest of its inputs
        v
    the engine loads the folder

`vllm` is a plug-in that runs inside the engine; `gateway` is a server in front of it. `attach` attaches adapters to a
model in this process without writing files. Nothing here imports `icm_cli`.
"""
