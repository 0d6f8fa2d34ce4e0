"""Makes the corpus of chat templates: what transformers' own Jinja renders, or that it refuses.

    python tests/reference/make_template_fixtures.py tests/fixtures/processor/templates.json [--every N]

A list of [template, rendered]; `rendered` is null where the reference raises. Every template sees one user turn with a
picture and TEXT, and the special tokens TOKENS. Most are products: each value with each filter, test, method and
operator; of those 20,000 every Nth is kept.
"""

import argparse
import itertools
import json
from pathlib import Path

from transformers.utils.chat_template_utils import render_jinja_template

TEXT = "a red cube <b> & 'c' 左边\n\n"
TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}

VALUES = r"""
''|'aB c'|' x\ty\n'|'\'"\\'|'<&>'|'äß左🎈'|'12'|'3.5e0x'|'a,b,,c'|'%s'|'x\r\ny'|'ǆ ŉ'|'\u0041\x41\n'
0|1|-3|7|255|1_000|0x1F|12345678901234567|1.0|-0.5|0.1|1e16|1e15|1e-4|1e-5|1.5e300|123456789.123|100.0|2.5
true|false|True|none|None|nothing|nothing.x
[]|[1,2,3]|['b','A','c']|[1,'a',none,true,1.0]|[[1,2],[3]]|[3,1,2,1]|()|(1,)|(1,'b')
{}|{'z':1,'a':[1,'x'],'m':{'k':none}}|{'b':'<','a':2}|{1:'one',none:2,true:3}|messages|messages[0]|messages[0].content
eos_token|range(4)|range(5,0,-2)|messages[0].content[1].text
""".strip().replace("\n", "|").split("|")
FILTERS = r"""
abs attr('x') batch(2) batch(2,'-') capitalize center center(9) count d d('D') default default('D',true) dictsort
dictsort(true) dictsort(false,'value') dictsort(reverse=true) e escape filesizeformat first float float(1.5) forceescape format format(1) groupby('x')
indent indent(2,true) indent('>>') indent(2,blank=true) int int(5) int(0,16) items join join('-') join(',',attribute='x') last length list lower map('upper')
map(attribute='x') map(attribute='x',default=0)|list map('string')|list map('length')|list max min pprint random reject reject('odd')|list reject('none')|list rejectattr('type')|list rejectattr('type','equalto','image')|list replace('a','b')
replace('a','b',1) reverse reverse|list reverse|string round round(1) round(1,'floor') round(0,'ceil') round|int safe select|list select('string')|list select('in',[1,'a'])|list
selectattr('type','equalto','image')|list selectattr('text','defined')|list slice(2) slice(2)|list slice(3,'f')|list sort sort(true) sort(reverse=true,case_sensitive=true) string striptags sum
sum(start=1) title tojson tojson(indent=2) tojson(ensure_ascii=true) tojson(separators=(',',':')) tojson(sort_keys=true) trim trim('a') truncate(3) truncate(3,true,'') unique|list upper urlencode urlize
wordcount wordwrap(3) xmlattr nosuchfilter batch(2)|list dictsort|list items|list
""".split()
TESTS = """
boolean callable defined divisibleby(2) divisibleby(0) eq(1) equalto('12') escaped even false filter float ge(1) gt(0) greaterthan(0) in([1,'']) integer iterable le(1) lower lt(2)
lessthan(2) mapping ne(1) none number odd sameas(none) sameas(true) sequence string test true undefined upper nosuchtest in('aB')
""".split()
METHODS = r"""
capitalize() casefold() center(9) center(9,'*') count('a') count(1) endswith('c') endswith(('c','y')) expandtabs() find('c') find('c',2) format(1,2) format(a=1) index('B') index(1)
isalnum() isalpha() isascii() isdecimal() isdigit() isidentifier() islower() isnumeric() isprintable() isspace() istitle() isupper() join(['1','2']) join([1]) join('ab')
ljust(8) ljust(8,'.') lower() lstrip() lstrip('a') partition('B') partition(',') removeprefix('a') removesuffix('c') replace('a','bb') replace('a','bb',1) replace('','-') rfind('a') rindex('a')
rjust(8) rpartition(',') rsplit() rsplit(',') rsplit(',',1) rsplit(none,1) rstrip() rstrip('c\n') split() split(',') split(',',1) split(',',maxsplit=1) split(none,1) split('') splitlines() splitlines(true) startswith('a')
startswith(('a','x')) strip() strip('c\n') swapcase() title() upper() zfill(6) encode() isfoo() nosuch nosuch.deeper
copy() get('a') get('q') get('q',5) items() items()|list keys() keys()|list values() values()|list pop(0) append(1) update({}) clear() sort() insert(0,1) setdefault('a',1) extend([1]) reverse() a m.k ['a'] [0] [-1] [9] [1:] [::-1] [:-1] [1:3]
[none] __class__ __len__() format_map({}) maketrans('a','b') translate({}) bit_length() is_integer() real as_integer_ratio() hex() start index
""".split()
OPERATORS = "+ - * / // % ** ~ == != < <= > >= and or in".split() + ["not in"]
OPERANDS = ["'a'", "'%s-%s'", "''", "0", "2", "-3", "1.5", "1e16", "true", "none", "nothing", "[1,2]", "['a']", "(1,2)", "{'a':1}", "'ab'", "7"]

FORMATS = [
    "'%s' % 1", "'%d' % 3.7", "'%5d|' % 42", "'%-5d|' % 42", "'%05d' % 42", "'%+d' % 42", "'% d' % 42", "'%x' % 255", "'%X' % 255",
    "'%#x' % 255", "'%o' % 8", "'%e' % 12345.678", "'%.2e' % 12345.678", "'%g' % 12345678.9", "'%g' % 0.00001", "'%.3g' % 1234.5",
    "'%.2f' % 3.14159", "'%8.2f|' % 3.14159", "'%f' % 1", "'%.0f' % 2.5", "'%r' % 'a'", "'%s' % 'ä'", "'%10s|' % 'a'",
    "'%-10s|' % 'a'", "'%.2s' % 'abc'", "'%c' % 65", "'%c' % 'x'", "'%%' % ()", "'%s %s' % (1, 'b')", "'%(a)s' % {'a': 1}",
    "'%(a)05.1f' % {'a': 1.25}", "'%s' % [1,2]", "'%s' % (1,)", "'%s' % none", "'%s' % true", "'%d' % true", "'%s'", "'%s %s' % 1", "'%q' % 1",
    "'%d' % 'a'", "'%i' % 4", "'%s' % 1e16", "'%*d' % (5, 42)", "'%a' % 'ä'", "'%s' % {'a': 1}", "'x' % ()", "'x' % 1", "'x' % {}", "'x' % []",
    "'{}'.format(1)", "'{} {}'.format(1, 'b')", "'{0}{1}{0}'.format('a', 'b')", "'{a}'.format(a=1)", "'{:>5}|'.format('a')",
    "'{:<5}|'.format('a')", "'{:^5}|'.format('a')", "'{:*^7}'.format('a')", "'{:05d}'.format(42)", "'{:+}'.format(4)",
    "'{:.2f}'.format(3.14159)", "'{:e}'.format(12345.678)", "'{:g}'.format(1e10)", "'{:%}'.format(0.25)", "'{:.1%}'.format(0.256)",
    "'{:,}'.format(1234567)", "'{:_}'.format(1234567)", "'{:x}'.format(255)", "'{:#x}'.format(255)", "'{:b}'.format(5)",
    "'{:c}'.format(65)", "'{:,.2f}'.format(12345.678)", "'{!r}'.format('a')", "'{!s:>4}'.format(1)", "'{{}}'.format(1)",
    "'{0[a]}'.format({'a': 1})", "'{0.x}'.format(1)", "'{:{}}'.format('a', 5)", "'{}'.format()", "'{:d}'.format(1.5)",
    "'{}'.format(true)", "'{}'.format(none)", "'{}'.format([1,'a'])", "'{:>8}'.format(1.5)", "'{:10}|'.format(true)", "'{'.format()",
    "'%s-%d'|format('a', 3)", "'%.1f'|format(2)", "'%(x)s'|format(x=4)",
]
EXPRESSIONS = [
    "1 + 2 * 3", "(1 + 2) * 3", "2 ** 3 ** 2", "-2 ** 2", "2 ** -1", "-3 // 2", "-3 % 2", "3 % -2", "7 / 2", "8 / 2", "7 // 2", "7.0 // 2", "-7.5 % 2",
    "10 ** 20", "2 ** 64", "9223372036854775807 + 1", "99999999999999999999", "-9223372036854775808 - 1", "3000000000 * 3000000000", "2 ** 200", "1e308 * 10", "-1e308 * 10", "(1e308*10) - (1e308*10)", "0.1 + 0.2", "1 / 3", "1e22", "1e23", "1.0e5", "123456789012345680.0",
    "1 < 2 < 3", "1 < 3 < 2", "3 > 2 > 1 == 1", "1 == 1.0", "true == 1", "'1' == 1", "none == none", "[1] == [1.0]", "(1,) == [1]", "{'a':1} == {'a':1.0}", "'a' < 'b'", "[1,2] < [1,3]", "'Z' < 'a'",
    "not true", "not 1 == 2", "not nothing", "1 and 0", "1 and 'x'", "0 or 'y'", "'' or none", "none or nothing", "1 if 0", "1 if 0 else 2", "1 if nothing else 2 if 1 else 3",
    "'a' ~ 1 ~ none ~ true ~ 1.0 ~ [1]", "'a' 'b'", "1 ~ 2", "'a' * 3", "3 * 'a'", "[1] * 2", "[1] + [2]", "(1,) + (2,)", "'a' + 'b'", "'a' + 1", "1 + none", "1 + true", "true + true", "-true", "+true", "- 'a'", "1.5 + true",
    "'b' in 'abc'", "'' in 'abc'", "1 in [1,2]", "1 in [true]", "'a' in {'a':1}", "'x' in nothing", "1 in 'abc'", "1 not in [1]", "not 1 in [1]", "none in [none]",
    "[1,2,3][1]", "[1,2,3][-1]", "[1,2,3][5]", "[1,2,3][1:]", "[1,2,3][::-1]", "[1,2,3][:2]", "[1,2,3,4,5][1:4:2]", "[1,2,3][5:]", "'abc'[1]", "'abc'[-1]", "'abc'[::-1]", "'äö左🎈'[1:3]", "'abc'[9]", "'abc'[::0]", "(1,2,3)[1:]", "range(5)[1]", "range(5)[1:3]",
    "{'a':1}.a", "{'a':1}['a']", "{'a':1}.b", "{'a':1}['b']", "{'items':1}.items", "{'items':1}['items']", "{'keys':2}.keys()|list", "{1:2}[1]", "{1:2}[1.0]", "{'a':1}[[1]]", "{'a':1,'a':2}", "{true:1,1:2}",
    "nothing", "nothing.a", "nothing.a.b", "nothing['a']", "nothing()", "nothing + 1", "nothing ~ 'a'", "nothing|length", "nothing|list", "nothing == none", "nothing is none", "nothing|default('x')", "nothing.a|default('x')", "nothing|upper", "-nothing", "nothing < 1", "[nothing]", "nothing == nothing", "nothing|string", "nothing|tojson", "[nothing]|join", "{'a':nothing}",
    "-1|abs", "(-1)|abs", "1 - 2|abs", "-2 is number", "1 + 1 is number", "2 is even and 3 is odd", "not 2 is even", "2 is not even", "'a' is string is true", "4 is divisibleby 2", "4 is divisibleby 2 and true", "1 is in [1]", "1 is not in [1]", "3 is eq 3", "'abc' is in 'xabcx'", "1 is sameas 1", "x is defined", "messages is defined", "messages[5] is defined", "messages[0].nope is defined", "1.0 is integer", "true is integer", "true is number", "1 is float", "none is iterable", "'a' is iterable", "'a' is sequence", "{} is sequence", "{} is mapping", "nothing is iterable", "range(3) is sequence", "range is callable", "namespace is callable",
    "'x'.upper().lower()", "'a,b'.split(',')[1]", "'a,b'.split(',')|last", "' a '.strip()|upper", "\"it's\"", "['it\\'s']", "['\"']", "['\\'\"']", "['a\\nb\\t\\x00\\x7f\\u200b\\xe9左']", "'a\\\nb'", "'\\q'", "'\\101'", "'\\N{BULLET}'", "'tab\\tx'", "'\\U0001F388'", "'\\ud83c'",
    "1_000", "0b101", "0o17", "0xff", "1_0.5_0", "1e5", "1E-5", "1.", ".5", "00", "007", "1__0", "1.5.upper", "1 .real", "true.real", "1e400", "5e-324", "1.7976931348623157e308",
    "range(3)", "range(3)|list", "range(1,10,3)|list", "range(5,0,-1)|list", "range(0)", "range(3)|length", "range(200000)|length", "range(3)|sum", "range(2.5)", "range('a')", "range(1,2)", "range(1,10,3)", "range(3) == range(3)", "range(3)|tojson",
    "dict(a=1,b=2)", "dict({'x':1},b=2)", "dict([('a',1)])", "dict()", "lipsum()", "cycler('a','b').next()", "joiner(',')", "joiner(',')()", "namespace(a=1).a", "namespace(a=1)", "namespace(a=1).b", "namespace({'a':1}).a", "namespace(_a=1)", "strftime_now('%Y')[:0]", "raise_exception('no')", "raise_exception()", "self", "loop", "caller", "varargs", "kwargs",
    "[1,2,3]|map('string')|join(',')", "messages|map(attribute='role')|list", "messages|map(attribute='content.0.type')|list", "messages|selectattr('role','equalto','user')|list|length", "messages|selectattr('role','==','user')|map(attribute='content')|first|length", "[1,2,3,4]|select('even')|list", "[1,2,3,4]|select('gt',2)|list", "[1,2]|map('float')|list", "['a','b']|map('replace','a','c')|list", "[3,1]|sort|join", "[{'x':2},{'x':1}]|sort(attribute='x')", "[{'x':2},{'x':1}]|sum(attribute='x')", "[{'x':2},{'x':1}]|map(attribute='x')|max", "[{'x':2,'y':1},{'x':1},{'x':2,'y':3}]|groupby('x')", "[{'x':2},{'x':1}]|groupby('x')|map('first')|list", "[{'x':'b'},{'x':'A'}]|unique(attribute='x')|list", "[{'x':2},{'x':1}]|min(attribute='x')", "[{'x':1},{}]|map(attribute='x')|list", "[{'x':1},{}]|map(attribute='x',default='d')|list", "['a','A','b']|unique|list", "['a','A','b']|unique(true)|list", "['b','A']|sort(case_sensitive=true)", "['b','A',1]|sort", "[none,1]|sort", "[[2],[1]]|sort", "[1,'a']|join(attribute='x')", "['<','&']|join", "[1.0,2.50]|join(' ')",
    "'a b  c'|wordcount", "'abc def'|truncate(5)", "'abc def ghi'|truncate(7,false,'…',0)", "'x'|indent", "'a\\nb\\n\\nc'|indent(2)", "'a\\nb\\n\\nc'|indent(2,true,true)", "'hello world foo'|wordwrap(6)", "'abc'|center(8)|length", "'%s'|format('x')", "'a<b'|e", "'a<b'|e ~ '<'", "('a<b'|safe) ~ '<'", "'<x>'|striptags", "('<'|safe) + '<'", "('<'|e)|length", "'<'|e|e", "'<'|e|upper", "('<'|safe) is escaped", "('%s'|safe) % '<'", "['<'|e,'<']|join", "'<'|safe|replace('<','>')", "'<'|forceescape", "('<'|safe)|tojson", "'&'|e|string",
    "1234567|filesizeformat", "1000|filesizeformat(true)", "42.55|round(1)", "2.5|round", "3.5|round|int", "-2.5|round", "1.005|round(2)", "2.675|round(2)", "1234|round(-2)", "'a'|round", "1|round", "42.7|int", "'42.7'|int", "'0x1f'|int(0,16)", "'z'|int", "none|int", "'1e3'|float", "'inf'|float", "'nan'|float", "'x'|float", "' 12 '|int", "'1_000'|int", "'٣'|int", "true|int", "[]|int", "1e400|int",
    "'a b&c/d?é'|urlencode", "{'a':1,'b c':'é'}|urlencode", "[('a',1)]|urlencode", "{'a':1,'b':none,'c':'<'}|xmlattr", "[1,2,3,4,5]|batch(2)|list", "[1,2,3,4,5]|batch(2,0)|map('list')|list", "[1,2,3,4,5]|slice(2)|list", "[1,2,3,4,5,6,7]|slice(3,'x')|list", "'abc'|list", "'abc'|first", "'abc'|last", "''|first", "[]|first|default('e')", "[]|last", "[]|max", "'abc'|max", "'abc'|reverse", "[1,2]|reverse", "'ab'|batch(1)|list", "{'b':1,'a':2}|list", "{'b':1,'a':2}|first", "{'b':1,'a':2}|length", "{'b':1,'a':2}|items|list", "{'b':1,'a':2}.items()|list", "{'b':1,'a':2}.items()", "{'b':1,'a':2}.keys()", "{'b':1,'a':2}.values()", "{'b':1,'a':2}|dictsort", "{'b':1,'A':2}|dictsort(true)", "{'b':1,'a':2}|tojson", "{'b':{'z':1,'y':[1,2.0,1e16,none,true,'é<>&\\'\"/\\n\\u2028\\x00']}}|tojson", "[1,2]|tojson(indent=2)", "{'a':[],'b':{}}|tojson(indent=4)", "{1:2,none:3,true:4,1.5:5}|tojson", "(1,2)|tojson", "'é'|tojson(ensure_ascii=true)", "'🎈'|tojson(true)", "{'b':1,'a':2}|tojson(sort_keys=true)", "messages|tojson", "messages", "messages[0]|string", "messages[0].items()|list", "messages[0].keys()|list", "messages[0]['content'][0]", "messages[0].content[0].type", "messages[-1].role", "messages[1:]", "messages|length", "tools", "documents", "tools is none", "add_generation_prompt", "bos_token", "eos_token ~ pad_token", "unk_token", "unk_token is defined", "image_token", "1e16|string", "1e16|int", "[1e16,1e-5,0.0001,-0.0,1e400,-1e400]", "1e16|tojson", "[1e400]|tojson", "1.0|tojson", "1e-5|tojson",
]
BLOCKS = [
    "{% for m in messages %}{{ m.role }}{% endfor %}", "{% for k, v in {'b':1,'a':2}.items() %}{{k}}={{v}};{% endfor %}", "{% for k in {'b':1,'a':2} %}{{k}}{% endfor %}", "{% for c in 'äb左' %}{{c}},{% endfor %}", "{% for x in none %}{% endfor %}", "{% for x in nothing %}a{% else %}b{% endfor %}", "{% for x in [] %}a{% else %}b{% endfor %}", "{% for x in 5 %}{% endfor %}",
    "{% for x in [1,2,3] %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.depth0 }} {% endfor %}", "{% for x in [1,2,3] %}{{ loop.previtem }}-{{ loop.nextitem }} {% endfor %}", "{% for x in [1,2,3] %}{{ loop.cycle('a','b') }}{% endfor %}", "{% for x in [1,1,2] %}{{ loop.changed(x) }}{% endfor %}", "{% for x in [1,2] %}{{ loop }}{% endfor %}", "{% for x in [1,2] %}{{ loop.nope }}{% endfor %}", "{% for x in [1] %}{{ loop.nope.deeper }}{% endfor %}",
    "{% for x in [1,2,3,4] if x is even %}{{ loop.index }}:{{ x }}/{{ loop.length }} {% endfor %}", "{% for x in [1,2,3] if x > 5 %}a{% else %}none{% endfor %}", "{% for x in [1,2,3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "{% for x in [1,2,3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", "{% break %}", "{% for x in [1,2] %}{% for y in [1,2] %}{{ loop.index }}{{ loop.depth }}{% endfor %}{% endfor %}", "{% for x in [1,2] recursive %}{{ x }}{% endfor %}", "{% for x in [{'c':[{'c':[]}]},{'c':[]}] recursive %}[{{ loop.depth }}{{ loop(x.c) }}]{% endfor %}", "{% for a, b in [(1,2),(3,4)] %}{{a}}{{b}}{% endfor %}", "{% for a, b in [(1,2,3)] %}{{a}}{% endfor %}", "{% for a, (b, c) in [(1,(2,3))] %}{{a}}{{b}}{{c}}{% endfor %}", "{% for (a, b) in [[1,2]] %}{{a}}{{b}}{% endfor %}", "{% for x in [1,2], [3] %}{{ x }}{% endfor %}", "{% for x in 1, 2 %}{{ x }}{% endfor %}", "{% for x in [1,2,3]|reverse %}{{ loop.last }}{{x}}{% endfor %}", "{% for x in range(3) %}{{ x }}{{ loop.length }}{% endfor %}", "{% for x in [3,1]|map('string') %}{{ loop.index }}{{ loop.last }}{{ x }}{% endfor %}",
    "{% set x = 1 %}{% for i in [1,2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }}", "{% set ns = namespace(x=1) %}{% for i in [1,2] %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}", "{% set ns = namespace() %}{% set ns.a = 1 %}{{ ns.a }}{{ ns.b is defined }}", "{% set d = {} %}{% set d.a = 1 %}", "{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}", "{% set a = 1, 2 %}{{ a }}", "{% set a, b = [1] %}", "{% set x %}hi {{ 1 }}{% endset %}{{ x }}|{{ x|length }}", "{% set x | upper %}hi{% endset %}{{ x }}", "{% set x %}<{% endset %}{{ x is escaped }}{{ x ~ '<' }}", "{% if true %}{% set y = 3 %}{% endif %}{{ y }}", "{% for i in [1] %}{% set y = 3 %}{% endfor %}{{ y }}", "{% set messages = messages[1:] %}{{ messages|length }}", "{% set loop = 1 %}{{ loop }}", "{% for x in [1] %}{% set loop = 2 %}{{ loop }}{% endfor %}", "{% set true = 1 %}", "{% set x = x %}{{ x }}", "{% set x = nothing %}{{ x is defined }}", "{% for x in [1,2] %}{% endfor %}{{ x }}", "{% set x = 5 %}{% for x in [1,2] %}{{ x }}{% endfor %}{{ x }}", "{% set x = 1 %}{% with x = 2 %}{{ x }}{% set x = 3 %}{{ x }}{% endwith %}{{ x }}", "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}", "{% with a = 1, b = a %}{{ b }}{% endwith %}", "{% with %}{% set q = 1 %}{% endwith %}{{ q }}", "{% set ns = namespace(l=[]) %}{% set ns.l = ns.l + [1] %}{{ ns.l }}", "{% set ns = namespace(a=1) %}{% set ns.a.b = 1 %}", "{% set ns = namespace(a=1) %}{{ ns['a'] }}{{ ns is mapping }}{{ ns.items is defined }}",
    "{% if 0 %}a{% elif '' %}b{% elif [] %}c{% elif {} %}d{% elif none %}e{% elif 0.0 %}f{% else %}g{% endif %}", "{% if 'a' %}x{% endif %}", "{% if nothing %}x{% endif %}", "{% if range(0) %}x{% else %}y{% endif %}", "{% if ()|list %}x{% endif %}", "{% if [1]|map('string') %}x{% endif %}", "{% if namespace() %}x{% endif %}", "{% if nothing is defined and nothing.x %}x{% endif %}", "{% if 1 in (1,2) %}x{% endif %}", "{% if not messages %}x{% else %}y{% endif %}", "{%if true%}x{%endif%}", "{% if true %}x{% else if false %}{% endif %}",
    "{% macro m(a, b=2) %}[{{ a }},{{ b }}]{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(b=1, a=2) }}{{ m() }}", "{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, x=2) }}", "{% macro m() %}x{% endmacro %}{{ m(1) }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(a=1, q=2) }}", "{% macro m(a, b=a) %}{{ b }}{% endmacro %}{{ m(1) }}", "{% macro m() %}{{ caller() }}!{% endmacro %}{% call m() %}in{% endcall %}", "{% macro m() %}{{ caller(1, 2) }}!{% endmacro %}{% call(a, b) m() %}{{ a }}{{ b }}{% endcall %}", "{% macro m(x) %}{% if x > 0 %}{{ x }}{{ m(x - 1) }}{% endif %}{% endmacro %}{{ m(3) }}", "{% set y = 1 %}{% macro m() %}{{ y }}{% endmacro %}{% set y = 2 %}{{ m() }}", "{% for y in [1] %}{% macro m() %}{{ y }}{% endmacro %}{{ m() }}{% endfor %}", "{% macro m() %}{% set y = 9 %}{% endmacro %}{{ m() }}{{ y }}", "{% macro m() %}<{% endmacro %}{{ m()|length }}{{ m() is escaped }}{{ m() ~ '<' }}", "{% macro m(a) %}{{ a is defined }}{% endmacro %}{{ m() }}", "{{ m() }}{% macro m() %}x{% endmacro %}", "{% macro m(a) %}{% endmacro %}{{ m.name }}{{ m.arguments }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, a=2) }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ [1,2]|map(m)|list }}", "{% macro m(x) %} {{- x -}} {% endmacro %}{{ m('a') }}|", "{% macro m(x) %}{{ messages|length }}{{ eos_token }}{% endmacro %}{{ m('a') }}", "{% if true %}{% macro m() %}x{% endmacro %}{% endif %}{{ m() }}", "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(*[1]) }}{{ m(**{'x':2}) }}", "{% macro m(x) %}{{ x }}{% endmacro %}{% set n = m %}{{ n(1) }}", "{% macro m(a, b) %}{{ b }}{% endmacro %}{{ m(1) }}|{{ m(1,2,3) }}",
    "{% filter upper %}a{{ 'b' }}{% endfilter %}", "{% filter trim|upper %} a {% endfilter %}", "{% filter replace('a','b') %}aa{% endfilter %}", "{% raw %}{{ x }}{% endraw %}", "{%- raw -%} {{ x }} {%- endraw -%}", "a {# c #} b", "a {#- c -#} b", "a\n{# c #}\nb", "{# {{ #}x", "{% block a %}x{% endblock %}", "{% extends 'x' %}", "{% include 'x' %}", "{% import 'x' as y %}", "{% autoescape true %}{{ '<' }}{% endautoescape %}", "{% do [].append(1) %}", "{% trans %}x{% endtrans %}", "{% debug %}", "{% nosuch %}",
    "{% generation %}x{{ 1 }}{% endgeneration %}", "{%- generation -%} x {%- endgeneration -%}", "{% set x = 1 %}{% generation %}{{ x }}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}", "{% for m in [1] %}{% generation %}{{ m }}{{ loop.index }}{% endgeneration %}{% endfor %}", "{% generation %}{% break %}{% endgeneration %}", "{% generation %}\n x\n{% endgeneration %}\ny", "a\n  {% generation %}\nx\n  {% endgeneration %}\ny", "{% generation %}", "{% set ns = namespace(a=1) %}{% generation %}{% set ns.a = 2 %}{% endgeneration %}{{ ns.a }}", "{% set generation = 1 %}{{ generation }}", "{% macro m() %}{% generation %}x{% endgeneration %}{% endmacro %}{{ m() }}", "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
    "  {% if true %}\n  x\n  {% endif %}\n  y", "a  {%- if true -%}  b  {%- endif -%}  c", "a  {%+ if true +%}  b  {% endif %}\nc", "  {%+ if true %}\nb{% endif %}", "a\n  {{ 1 }}\n b", "a\n  {{- 1 -}}\n b", "{{ 1 }}\n", "a\n\n", "a\n", "\n", "", "{% if true %}\n\n\nx{% endif %}\n\n", "\t{% if true %}x\t{% endif %}\t\n", "a{% if true %} \n{% endif %}b", "a\r\nb\rc\n", "{% if true %}\r\nx\r\n{% endif %}\r\n", "\r{% if true %}\rx", "{{ 'a\r\nb' }}", "a\r\n  {% if true %}\r\n b {% endif %}", "\u2028a\x0b\x0c\x85b\n", "\u00a0 {% if true %}x{% endif %}", "\u3000\n{%- if true -%}\u00a0x{% endif %}", "x {%- set a = 1 %} y", "x {%- set a = 1 -%} y", "{#- a -#}\n  b", "  {# a #}\n  b", "a {# b #}\n{# c #}\nd", "{{ '{{' }}{{ '}}' }}", "{{ '%}' }}", "{% set a = '%}' %}{{ a }}", "{{ {'a':{'b':1}}}}", "{{ {'a':{'b':1}} }}", "# x", "## x", "{ {x} }", "{%", "{{", "{#", "{{ 1", "{% if true %}", "}}", "%}", "{% endfor %}", "{{ 1 }}}", "{{ }}", "{{ 1 2 }}", "{{ a b }}", "{{ 1, 2 }}", "{{ 1, }}", "{{ (1) }}", "{{ [1,] }}", "{{ {'a':1,} }}", "{{ f'x' }}", "{{ x = 1 }}", "{{ not }}", "{{ 'a }}", "{{ -}}", "{{-1}}", "{{- 1}}", "{{+1}}", "{{ - 1 -}}", "{{ a.1 }}", "{{ [1,[2]].1.0 }}", "{{ [1,2].0 }}", "{{ 'abc'.0 }}", "{{ a..b }}", "{{ $ }}", "{{ 'a'!='b' }}", "{{ a? }}", "{{ 1 if true else }}", "{{ a|b.c }}", "{{ ä }}", "{% set ä = 1 %}{{ ä }}", "{{ x-y }}", "{{1-1}}", "{{ 1 --1 }}", "{{ not not 1 }}", "{{ --1 }}", "{{ ~1 }}", "{{ 1 <> 2 }}", "{{ 1 is }}", "{{ [x for x in [1]] }}", "{{ lambda: 1 }}", "{{ *[1] }}", "{{ 'a'['b'] }}", "{{ 'upper'.upper }}", "{{ [].append }}", "{{ none.x }}", "{{ none.x.y }}", "{{ 1.x }}", "{{ none() }}", "{{ 'a'() }}", "{{ true() }}", "{{ [1]() }}",
    "{%- for message in messages %}{%- if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}{% for content in message['content'] %}{% if content['type'] == 'image' %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|image_pad|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endfor %}{{ image_count.value }}",
    "{%- macro render_content(content, do_vision_count) %}\n    {%- if content is string %}\n        {{- content }}\n    {%- else %}\n        {%- for item in content %}\n            {%- if 'image' in item or item.type == 'image' %}\n                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}\n            {%- elif 'text' in item %}\n                {{- item.text }}\n            {%- endif %}\n        {%- endfor %}\n    {%- endif %}\n{%- endmacro %}\n{%- for message in messages %}\n    {%- set content = render_content(message.content, True) %}\n    {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}\n{%- endfor %}\n",
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}[INST] {{ message['content'][1]['text'] | trim }} [/INST]{% endfor %}{{ eos_token }}",
    "{%- if tools %}\n    {{- 'x' }}\n{%- else %}\n    {%- if messages[0].role == 'system' %}\n        {{- 'y' }}\n    {%- endif %}\n{%- endif %}\n{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0 %}\n    {%- if ns.multi_step_tool and message.role == 'user' and message.content is not string %}\n        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n    {%- endif %}\n{%- endfor %}{{ ns.last_query_index }}{{ ns.multi_step_tool }}",
]


def products():
    for value, name in itertools.product(VALUES, FILTERS):
        yield f"{{{{ {grouped(value)}|{name} }}}}"
    for value, name in itertools.product(VALUES, TESTS):
        yield f"{{{{ {grouped(value)} is {name} }}}}"
    for value, name in itertools.product(VALUES, METHODS):
        yield f"{{{{ {grouped(value)}{name if name.startswith('[') else '.' + name} }}}}"
    for left, operator, right in itertools.product(OPERANDS, OPERATORS, OPERANDS):
        yield f"{{{{ {left} {operator} {right} }}}}"


def cases(every):
    yield from itertools.islice(products(), 0, None, every)
    for value in VALUES:
        yield f"{{{{ {value} }}}}{{{{ [{value}] }}}}{{{{ {{'k': {value}}} }}}}{{{{ '' ~ {value} }}}}{{% if {value} %}}y{{% endif %}}"
    for expression in FORMATS + EXPRESSIONS:
        yield f"{{{{ {expression} }}}}"
    yield from BLOCKS


def grouped(value):
    """A negative number is a filter's or a method's own only in parentheses."""
    return f"({value})" if value[0] in "-0123456789" else value


def render(template):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TEXT}]}
    try:
        [text], _ = render_jinja_template([[turn]], chat_template=template, add_generation_prompt=True, **TOKENS)
        text.encode()
    except Exception:  # whatever it says, it refuses
        return None
    return text


def deterministic(template):
    """Without what is drawn by chance, or is an address in memory."""
    first = render(template)
    return first == render(template) and (first is None or " at 0x" not in first)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--every", type=int, default=11)
    arguments = parser.parse_args()
    templates = dict.fromkeys(cases(arguments.every))
    made = [[template, render(template)] for template in templates if deterministic(template)]
    lines = ",\n".join(json.dumps(case, ensure_ascii=True) for case in made)
    arguments.out.write_text(f"[\n{lines}\n]\n")
    print(f"{len(made)} templates, {sum(text is None for _, text in made)} of them refused")


if __name__ == "__main__":
    main()
