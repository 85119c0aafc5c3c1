from ..core.compute import prepare_process

prepare_process()        # before torch is imported
