"""Response tokens as a chat template marks them by {% generation %}, and as they are found without."""

import pytest
from text_sources import CHATML, MESSAGES, THOUGHT_LAST
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retrofit.errors import DataError
from retrofit.recipes.text.conversations import Chat
from retrofit.recipes.text.tokens import encode


def marked(template, turn):
    """The template with `{% generation %}` around what it writes of an assistant's turn.

    The empty text keeps a line end that follows, which Jinja would take for the end of the block's own line.
    """
    inside = f"{{% generation %}}{turn}{{% endgeneration %}}"
    assert template.count(turn) == 1
    return template.replace(
        turn, f"{{% if m.role == 'assistant' %}}{inside}{{% else %}}{turn}{{% endif %}}{{{{ '' }}}}"
    )


THOUGHT = "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
BOTH_WAYS = {
    "chatml": (CHATML, "{{ m.content }}<|im_end|>"),
    "thought_last": (THOUGHT_LAST, THOUGHT + "{{ m.content.split('</think>')[-1] }}<|im_end|>"),
}


def encoded(template, tokenizer):
    tokenizer.chat_template = template
    return encode(Chat(MESSAGES), tokenizer, "here")


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_marks_of_a_template_agree_with_what_is_found_without(chat_tokenizer, name):
    template, turn = BOTH_WAYS[name]
    found = encoded(template, chat_tokenizer)
    assert encoded(marked(template, turn), chat_tokenizer) == found
    assert sum(found[1]) > 0
    # The marks decide: other ones give the same tokens and other flags.
    for other in ("<|im_end|>", "{{ m.role }}\n", "{{ m.role }}\n" + turn):
        tokens, response = encoded(marked(template, other), chat_tokenizer)
        assert tokens == found[0]
        assert response != found[1]


def test_marks_are_followed_where_nothing_can_be_found_without(chat_tokenizer):
    template = "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}"
    with pytest.raises(DataError, match="cannot tell"):
        encoded(template, chat_tokenizer)
    tokens, response = encoded(marked(template, "{{ m.content | upper }}"), chat_tokenizer)
    text = chat_tokenizer.decode([token for token, flag in zip(tokens, response, strict=True) if flag])
    assert text == "A<B> USER"


def test_marks_that_cover_no_response_are_told(chat_tokenizer):
    template = "{% for m in messages %}{{ m.content }};{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    template += "{% endfor %}"
    with pytest.raises(DataError, match="here: the chat template leaves no response token"):
        encoded(template, chat_tokenizer)


def test_a_tokenizer_that_leaves_out_spaces_does_not_mark_all_that_follows(chat_tokenizer):
    words = ["<unk>", "you", "a", "answer", "user", "assistant", "system", "<b>", "END"]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    template, turn = "{% for m in messages %} {{ m.role }} {{ m.content }} END {% endfor %}", " {{ m.content }} END "
    template += "{% if add_generation_prompt %} assistant{% endif %}"
    assert encoded(marked(template, turn), tokenizer) == encoded(template, tokenizer)
    tokens, response = encoded(template, tokenizer)
    flagged = [words[token] for token, flag in zip(tokens, response, strict=True) if flag]
    assert flagged == ["a", "END", "<b>", "user", "END"]
