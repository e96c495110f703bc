from wsgi_ts.handlers.toolkit.text_utils import get_tokenizer, ngrams_iterator
