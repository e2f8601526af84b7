# SPDX-License-Identifier: Apache-2.0
"""The demo in the browser: ask, compare, look inside, play a video, read the board.

`studio` does the work and `scenes` draws pictures with known answers, both without Gradio; `guard` opens what strangers
upload; `board` reads results; `pages` writes what is shown; `app` is the Gradio part and `serve` starts it.
"""
