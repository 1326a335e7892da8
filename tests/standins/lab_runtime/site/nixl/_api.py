from nixl_cu12._api import *  # noqa: F403
from nixl_cu12._api import nixl_agent as nixl_agent
from nixl_cu12._api import nixl_xfer_handle as nixl_xfer_handle
