"""Many clients at once, and clients that leave."""

import asyncio

from cluster_state import held, wait_until, wait_until_empty

ENDLESS = dict(prompt="Once upon a time", max_tokens=1800, extra_body={"ignore_eos": True})


def test_concurrent_clients(async_client, cluster, model):
    async def one(client, number):
        ask = dict(model=model, messages=[{"role": "user", "content": f"Say the number {number}."}], max_tokens=8,
                   temperature=0.8, seed=number)
        whole = await client.chat.completions.create(**ask)
        text = ""
        async for chunk in await client.chat.completions.create(**ask, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == whole.choices[0].message.content
        return text

    async def all_of_them():
        async with async_client() as client:
            return await asyncio.gather(*(one(client, number) for number in range(24)))

    assert len(asyncio.run(all_of_them())) == 24
    wait_until_empty(cluster["url"])


def test_a_client_that_closes_its_stream(client, cluster, model):
    stream = client.completions.create(model=model, stream=True, **ENDLESS)
    next(iter(stream))
    wait_until("the request to run", lambda: held(cluster["url"]))
    stream.close()
    wait_until_empty(cluster["url"])


def test_a_client_that_is_cancelled(async_client, cluster, model):
    async def leave():
        async with async_client() as client:
            asking = asyncio.create_task(client.completions.create(model=model, **ENDLESS))
            await asyncio.to_thread(wait_until, "the request to run", lambda: held(cluster["url"]))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            # the connection is closed, not only forgotten
        await asyncio.to_thread(wait_until_empty, cluster["url"])

    asyncio.run(leave())
