"""A log4j2.xml in the shape that users of TorchServe have."""

from __future__ import annotations

LOG4J2 = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="warn">
  <Properties>
    <Property name="where">${env:LOG_LOCATION:-logs}</Property>
    <Property name="line" value="%d{ISO8601} [%-5p] %t %c - %m%n"/>
  </Properties>
  <Appenders>
    <Console name="screen" target="SYSTEM_OUT"><PatternLayout pattern="${line}"/></Console>
    <RollingFile name="access" fileName="${where}/requests.log"
                 filePattern="${where}/requests.%d{yyyy-MM-dd}.%i.log.gz">
      <PatternLayout><Pattern>%d{HH:mm} %-6level access: %msg [%c{1}]%n</Pattern></PatternLayout>
      <Policies>
        <SizeBasedTriggeringPolicy size="2 KB"/>
        <TimeBasedTriggeringPolicy/>
      </Policies>
      <DefaultRolloverStrategy max="3"/>
    </RollingFile>
    <RollingFile name="server" fileName="${where}/ts_log.log" filePattern="${where}/ts_log.%d{dd-MMM}.log.gz">
      <PatternLayout pattern="${line}"/>
      <Policies><TimeBasedTriggeringPolicy/></Policies>
    </RollingFile>
    <Async name="later"><AppenderRef ref="server"/></Async>
    <Socket name="logstash" host="localhost" port="9500"><JsonLayout/></Socket>
  </Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="info" additivity="false"><AppenderRef ref="access"/></Logger>
    <Logger name="org.pytorch.serve" level="debug"/>
    <Logger name="MODEL_LOG" level="warn"/>
    <Logger name="io.netty" level="error"/>
    <Root level="info">
      <AppenderRef ref="screen"/>
      <AppenderRef ref="later"/>
      <AppenderRef ref="logstash"/>
    </Root>
  </Loggers>
</Configuration>
"""
