"""Whose sessions a request may see. One place; every route asks here."""

from typing import Annotated

from fastapi import Depends


async def tenant() -> str:
    """Everybody is the same tenant."""
    return ""


Tenant = Annotated[str, Depends(tenant)]
