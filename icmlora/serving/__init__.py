"""Adapters for the engines that answer requests: a task is written the first time that somebody asks for it.

    request for "dog-detection"
        |
        v
    ServedTasks.find      one look into an index: unknown names cost nothing more
        v
    EngineBase.problem    is it of the engine's base model, with modules that this has?
        v
    AdapterFolders.get    written once, under the digest of everything it follows from, and never changed
        v
    the engine loads the folder

Each engine is one file: `vllm` is a plug-in that runs inside the engine, `gateway` a server in front of one. `attach`
puts adapters into a model of this process, without any folder. Nothing here knows `icm_cli`.
"""
